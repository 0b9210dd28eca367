"""The whole MLP as one autograd function: RMSNorm, fc1, SwiGLU, fc2.

Forward: a norm that writes FP8, a GEMM, a SwiGLU that writes FP8, a GEMM. Kept: the input, fc1's output
(BF16, or 8 bits with `stash`) and 4 bytes a token. TransformerEngine and Megatron also keep the norm's result
and SwiGLU's in FP8, which the backward here writes while it reads the same bytes anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_fp8_ext.fused import residual
from megatron_fp8_ext.fused.linear import Linear, Setup, flat, norm_column_backward
from megatron_fp8_ext.kernels.cast import cast_1x128
from megatron_fp8_ext.kernels.rmsnorm import rmsnorm_cast
from megatron_fp8_ext.kernels.stash import Stash
from megatron_fp8_ext.kernels.swiglu import swiglu_backward_cast, swiglu_cast


@dataclass(frozen=True)
class Block:
    """The MLP's layers.

    Attributes:
        fc1: `[2F, H]`, gate then up; under tensor parallelism this rank's rows of both.
        fc2: `[H, F]`, this rank's columns.
        eps: the norm's epsilon.
        setup: see `Setup`.
        stash: keep fc1's output in 8 bits instead of BF16 (`kernels.stash`).
    """

    fc1: Linear
    fc2: Linear
    eps: float
    setup: Setup
    stash: bool = False


def mlp(x: Tensor, gain: Tensor, block: Block, add: bool = False) -> Tensor:
    """Return fc2(SwiGLU(fc1(RMSNorm(x)))), `[..., H]` BF16.

    Args:
        x: `[..., H]` BF16; under sequence parallelism this rank's tokens.
        gain: `[H]`, the norm's weight.
        block: the layers.
        add: add `x`, the residual, in the last GEMM; only on one rank.
    """
    if torch.is_grad_enabled():
        branch = None if add else residual.offer(x)
        out: Tensor = _MLP.apply(
            x, gain, block.fc1.parameter, block.fc2.parameter, block, branch, add
        )
        return out
    return _forward(flat(x), gain, block, keep=False, add=add)[0].view(x.shape)


def _forward(
    x: Tensor, gain: Tensor, block: Block, keep: bool, add: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(output, rstd, what is kept of fc1's output: itself, or its stash)."""
    setup = block.setup
    normed = rmsnorm_cast(x, gain, block.eps, setup.scale_format, columns=False)
    a = setup.gemm.fprop(setup.gather(normed.cast), block.fc1.operand)
    stash = keep and block.stash
    activated = swiglu_cast(a, setup.scale_format, columns=False, stash=stash)
    past = x if add else None
    y = setup.reduce(setup.gemm.fprop(activated.cast, block.fc2.operand, add=past))
    return y, normed.rstd, (a,) if activated.stash is None else tuple(activated.stash)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        weight1: Tensor,
        weight2: Tensor,
        block: Block,
        branch: residual.Branch | None,
        add: bool,
    ) -> Tensor:
        matrix = flat(x)
        y, rstd, kept = _forward(matrix, gain, block, keep=True, add=add)
        ctx.save_for_backward(matrix, gain, rstd, *kept)
        ctx.block, ctx.shape, ctx.branch, ctx.add = block, x.shape, branch, add
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, rstd, *kept = ctx.saved_tensors
        block: Block = ctx.block
        setup = block.setup
        want1, want2 = ctx.needs_input_grad[2:4]
        a = Stash(*kept) if block.stash else kept[0]
        matrix = flat(grad)
        past = matrix if ctx.add else None
        if ctx.branch is not None:
            past = ctx.branch.take()
        dy = setup.gather(cast_1x128(matrix, setup.scale_format))
        del grad, matrix
        dz = setup.gemm.dgrad(dy, block.fc2.operand)
        inner = swiglu_backward_cast(dz, a, setup.scale_format, y_columns=want2)
        del dz, a, kept
        dw2 = None
        if want2:
            assert inner.y is not None
            dw2 = block.fc2.gradient(setup.gemm, inner.y, dy)
        da = inner.cast
        del dy, inner
        dx, dgain, dw1 = norm_column_backward(x, gain, rstd, da, block.fc1, setup, want1, past)
        return dx.view(ctx.shape), dgain, dw1, dw2, None, None, None
