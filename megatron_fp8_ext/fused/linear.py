"""Linear layers with their casts: `norm_linear` and `cast_linear`, and what the whole MLP shares with them.

Shapes: M tokens (sequence x batch, flattened), K input and N output features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_fp8_ext.fused import residual
from megatron_fp8_ext.fused.gemm import Gemm, Weight
from megatron_fp8_ext.fused.parallel import Parallel
from megatron_fp8_ext.kernels import main_grad
from megatron_fp8_ext.kernels.cast import BlockCast, cast_1x128, cast_1x128_and_sum
from megatron_fp8_ext.kernels.rmsnorm import (
    rmsnorm_backward_cast,
    rmsnorm_cast,
    rmsnorm_columns,
)
from megatron_fp8_ext.recipe import ScaleFormat


@dataclass(frozen=True)
class Setup:
    """How a block computes.

    Attributes:
        gemm: who multiplies.
        scale_format: `power_of_two` or `float32`.
        parallel: tensor parallelism; None on one rank.
    """

    gemm: Gemm
    scale_format: ScaleFormat
    parallel: Parallel | None = None

    def gather(self, cast: BlockCast) -> BlockCast:
        """Under sequence parallelism, the cast of all tokens."""
        return cast if self.parallel is None else self.parallel.gather(cast)

    def reduce(self, partial: Tensor) -> Tensor:
        """Under tensor parallelism, the sum over the ranks."""
        return partial if self.parallel is None else self.parallel.reduce(partial)


@dataclass(frozen=True)
class Linear:
    """The weight of a linear layer.

    Attributes:
        parameter: `[N, K]`, what gets the gradient (it may hold FP8 itself).
        operand: its 128x128 cast for `Setup.gemm`, both uses.
        accumulate: whether `main_grad` already has gradients of this step to add to.
    """

    parameter: Tensor
    operand: Weight
    accumulate: bool = True

    def gradient(self, gemm: Gemm, x: BlockCast, dy: BlockCast) -> Tensor:
        """Add the gradient to Megatron's buffer, or return it where there is none."""
        buffer = main_grad.of(self.parameter)
        if buffer is None:
            return gemm.wgrad(x, dy, None, accumulate=False)
        # A layer used twice in the first micro-batch: its second gradient is added all the same.
        add = self.accumulate or bool(self.parameter.grad_added_to_main_grad)
        overwrite = getattr(self.parameter, "overwrite_main_grad", False)
        gemm.wgrad(x, dy, buffer, accumulate=add and not overwrite)
        return main_grad.dummy(self.parameter)


def flat(x: Tensor) -> Tensor:
    """`[..., K]` as a contiguous matrix."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def norm_linear(
    x: Tensor, gain: Tensor, eps: float, linear: Linear, bias: Tensor | None, setup: Setup
) -> Tensor:
    """RMSNorm, then a (column-parallel) linear layer: norm-QKV.

    Kept for the backward: `x` and 4 bytes a token. The operand of wgrad is computed again from them.

    Args:
        x: `[..., K]` BF16; under sequence parallelism this rank's tokens.
        gain: `[K]`, the norm's weight.
        eps: the norm's epsilon.
        linear: this rank's rows of the weight.
        bias: `[N]`, or None.
        setup: see `Setup`.

    Returns:
        `[..., N]` BF16, of all tokens.
    """
    if torch.is_grad_enabled():
        branch = residual.offer(x)
        out: Tensor = _NormLinear.apply(x, gain, linear.parameter, bias, eps, linear, setup, branch)
        return out
    return _norm_linear(flat(x), gain, eps, linear, bias, setup)[0].view(
        -1, *x.shape[1:-1], linear.parameter.shape[0]
    )


def _norm_linear(
    x: Tensor, gain: Tensor, eps: float, linear: Linear, bias: Tensor | None, setup: Setup
) -> tuple[Tensor, Tensor]:
    normed = rmsnorm_cast(x, gain, eps, setup.scale_format, columns=False)
    y = setup.gemm.fprop(setup.gather(normed.cast), linear.operand, bias)
    return y, normed.rstd


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        linear: Linear,
        setup: Setup,
        branch: residual.Branch | None,
    ) -> Tensor:
        matrix = flat(x)
        y, rstd = _norm_linear(matrix, gain, eps, linear, bias, setup)
        ctx.save_for_backward(matrix, gain, rstd)
        ctx.linear, ctx.setup, ctx.shape, ctx.bias = linear, setup, x.shape, bias
        ctx.branch = branch
        # Under sequence parallelism the first dimension grows to that of all tokens.
        return y.view(-1, *x.shape[1:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, rstd = ctx.saved_tensors
        setup: Setup = ctx.setup
        past = None if ctx.branch is None else ctx.branch.take()
        dy, db = flat(grad), None
        if ctx.bias is not None:
            buffer = main_grad.of_vector(ctx.bias)
            dy_cast, db = cast_1x128_and_sum(dy, setup.scale_format, dy.dtype, add_to=buffer)
            db = db if buffer is None else main_grad.dummy(ctx.bias)
        else:
            dy_cast = cast_1x128(dy, setup.scale_format)
        del dy, grad
        dx, dgain, dw = norm_column_backward(
            x, gain, rstd, dy_cast, ctx.linear, setup, ctx.needs_input_grad[2], past
        )
        return dx.view(ctx.shape), dgain, dw, db, None, None, None, None


def norm_column_backward(
    x: Tensor,
    gain: Tensor,
    rstd: Tensor,
    dy: BlockCast,
    linear: Linear,
    setup: Setup,
    want_weight: bool,
    past: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Backward of RMSNorm and the column-parallel linear layer after it, from the cast of dy.

    `past` `[M, K]` is what reaches `x` beside them, the residual's gradient; it is added to theirs.

    Returns:
        (gradient of `x`, of the norm's weight in its dtype, of the linear layer's weight); the latter two
        are in Megatron's buffers where there are such.
    """
    dn = setup.reduce(setup.gemm.dgrad(dy, linear.operand))
    dw = None
    if want_weight:
        normed = setup.gather(rmsnorm_columns(x, gain, rstd, setup.scale_format))
        dw = linear.gradient(setup.gemm, normed, dy)
        del normed
    buffer = main_grad.of_vector(gain)
    gradients = rmsnorm_backward_cast(
        dn,
        x,
        gain,
        rstd,
        setup.scale_format,
        residual=past,
        rows=False,
        columns=False,
        dtype=gain.dtype,
        add_to=buffer,
    )
    return gradients.dx, gradients.dweight if buffer is None else main_grad.dummy(gain), dw


def cast_linear(x: Tensor, linear: Linear, setup: Setup, add: Tensor | None = None) -> Tensor:
    """A (row-parallel) linear layer without bias: the attention's projection.

    Kept for the backward: `x` itself. The attention before it keeps its result too, where it returns it
    as it lies; then that costs nothing, and the cast for wgrad is made in the backward.

    Args:
        x: `[..., K]` BF16, of all tokens: this rank's input features.
        linear: this rank's columns of the weight.
        setup: see `Setup`.
        add: `[..., N]` BF16, the residual, added by the GEMM; only on one rank.

    Returns:
        `[..., N]` BF16, summed over the ranks; this rank's tokens under sequence parallelism.
    """
    if torch.is_grad_enabled():
        branch = None if add is None else residual.claimed(add)
        out: Tensor = _CastLinear.apply(x, linear.parameter, add, linear, setup, branch)
        return out
    y = _cast_linear(flat(x), linear, setup, add)
    return y.view(-1, *x.shape[1:-1], linear.parameter.shape[0])


def _cast_linear(x: Tensor, linear: Linear, setup: Setup, add: Tensor | None) -> Tensor:
    rows = cast_1x128(x, setup.scale_format, columns=False)
    flat_add = None if add is None else flat(add)
    return setup.reduce(setup.gemm.fprop(rows, linear.operand, add=flat_add))


class _CastLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        add: Tensor | None,
        linear: Linear,
        setup: Setup,
        branch: residual.Branch | None,
    ) -> Tensor:
        matrix = flat(x)
        y = _cast_linear(matrix, linear, setup, add)
        ctx.save_for_backward(matrix)
        ctx.linear, ctx.setup, ctx.shape, ctx.branch = linear, setup, x.shape, branch
        return y.view(-1, *x.shape[1:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        linear, setup = ctx.linear, ctx.setup
        past = grad if ctx.needs_input_grad[2] else None
        if ctx.branch is not None:
            ctx.branch.give(grad)
            past = None
        dy = setup.gather(cast_1x128(flat(grad), setup.scale_format))
        dw = None
        if ctx.needs_input_grad[1]:
            columns = cast_1x128(x, setup.scale_format, rows=False)
            dw = linear.gradient(setup.gemm, columns, dy)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = setup.gemm.dgrad(dy, linear.operand).view(ctx.shape)
        return dx, dw, past, None, None, None
