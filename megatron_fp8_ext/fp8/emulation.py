"""The recipe without an FP8 GEMM: quantize, dequantize, multiply in FP32.

The codes and the scales are those of the GPU path (`reference.py`), products of two E4M3 values
are exact in FP32, and the GPU accumulates in FP32 too, so only the order of summation differs.
Costs about twice the time of BF16 on a CPU; it exists so that the recipe runs, is tested and can be
debugged where no Hopper GPU is.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp8_ext.fp8 import casts, reference
from megatron_fp8_ext.fp8.casts import INFIR2_CASTS, Casts
from megatron_fp8_ext.fp8.collectives import gather_first, reduce_scatter_first
from megatron_fp8_ext.recipe import Cast, ScaleFormat

# Casts done in this process, by operand and direction ("input rows", ...): the proof that a run
# was quantized at all. Megatron's own path without TransformerEngine silently is not.
quantizations: Counter[str] = Counter()

_active: Casts | None = None


@contextlib.contextmanager
def autocast(scale_format: ScaleFormat, operands: Casts = INFIR2_CASTS) -> Iterator[None]:
    """Within it, the linear layers of the model compute with emulated FP8 GEMMs."""
    global _active
    outer, _active = _active, operands._replace(scale_format=scale_format)
    try:
        yield
    finally:
        _active = outer


def active_scale_format() -> ScaleFormat | None:
    """Return the scale format of the enclosing `autocast`, or None outside of one."""
    return None if _active is None else _active.scale_format


def active_casts() -> Casts | None:
    """Return the casts of the enclosing `autocast`, or None outside of one."""
    return _active


def _rows(x_MK: Tensor, cast: Cast, scale_format: ScaleFormat) -> reference.Quantized:
    return casts.quantize(x_MK, cast, scale_format)


def _columns(x_MK: Tensor, cast: Cast, scale_format: ScaleFormat) -> reference.Quantized:
    """Cast along the token axis, returned as `[K, M]`: the operands of wgrad."""
    return casts.quantize(x_MK.t().contiguous(), cast, scale_format)


class EmulatedLinear(torch.autograd.Function):
    """y = x W^T + b with the three GEMMs of the recipe, tensor and sequence parallel.

    The contract (arguments, collectives, gradients) is that of Megatron's
    `linear_with_grad_accumulation_and_async_allreduce` (core/tensor_parallel/layers.py).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        group: Any,
        scale_format: ScaleFormat,
        operands: Casts = INFIR2_CASTS,
    ) -> Tensor:
        """Return `[..., N]` in the dtype of `x` `[..., K]`; `weight` is `[N, K]`."""
        total = gather_first(x, group) if sequence_parallel else x
        x_MK = total.reshape(-1, total.shape[-1])
        x_q = _rows(x_MK, operands.input, scale_format)
        w_q = _rows(weight.detach(), operands.weight, scale_format)
        quantizations.update(["input rows", "weight"])
        y_MN = x_q.dequantize() @ w_q.dequantize().t()
        if bias is not None:
            y_MN = y_MN + bias.to(torch.float32)
        ctx.save_for_backward(x, w_q.codes, w_q.scale_inv)
        ctx.weight_dtype, ctx.weight_block = weight.dtype, w_q.block
        ctx.has_bias = bias is not None
        ctx.allreduce_dgrad, ctx.sequence_parallel = allreduce_dgrad, sequence_parallel
        ctx.group, ctx.scale_format, ctx.operands = group, scale_format, operands
        return y_MN.to(x.dtype).reshape(*total.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Return the gradients of input, weight and bias, reduced as Megatron expects."""
        x, w_codes, w_scale_inv = ctx.saved_tensors
        total = gather_first(x, ctx.group) if ctx.sequence_parallel else x
        x_MK = total.reshape(-1, total.shape[-1])
        dy_MN = grad.reshape(-1, grad.shape[-1])

        dy_q = _rows(dy_MN, ctx.operands.grad_output, ctx.scale_format)
        w_q = reference.Quantized(w_codes, w_scale_inv, ctx.weight_block)
        dx = (dy_q.dequantize() @ w_q.dequantize()).to(x.dtype).reshape(total.shape)
        if ctx.allreduce_dgrad:
            dist.all_reduce(dx, group=ctx.group)
        if ctx.sequence_parallel:
            dx = reduce_scatter_first(dx, ctx.group)

        dy_t = _columns(dy_MN, ctx.operands.grad_output, ctx.scale_format)
        x_t = _columns(x_MK, ctx.operands.input, ctx.scale_format)
        dw = (dy_t.dequantize() @ x_t.dequantize().t()).to(ctx.weight_dtype)
        quantizations.update(["grad rows", "grad columns", "input columns"])
        db = dy_MN.sum(dim=0) if ctx.has_bias else None
        return dx, dw, db, None, None, None, None, None
