"""LM head and cross-entropy with three head GEMMs: gradients are made in the forward, with the logits.

The tokens are walked in slices, `[slice, V]` logits at a time: softmax, its gradient in place, and both of
its products, as Liger-Kernel does. That needs the weight of each token's loss before the backward brings it.
It is the loss mask times one factor, whatever Megatron divides by; the backward looks whether it is so and
only scales. Where it is not, the gradients are made again as `linear_cross_entropy` makes them, to the same
result, and the caller is told.

Price: the gradient of the head in FP32 between forward and backward, `[V, H]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp8_ext.fp8.collectives import gather_first
from megatron_fp8_ext.kernels import linear_cross_entropy as chunked
from megatron_fp8_ext.kernels import main_grad as main_grads

# Bytes of the slice of logits: 4096 tokens of 152k. Each slice reads and writes the head's gradient.
SLICE_BYTES = 1280 * 2**20
_ALIGNMENT = 128
# How far the weight of a token may be from a multiple of the mask: FP32 rounding of the reduction.
_TOLERANCE = 1e-6


def slice_size(tokens: int, vocabulary: int, element_size: int) -> int:
    """Return how many tokens are taken at a time: equal slices that fit SLICE_BYTES."""
    fit = max(SLICE_BYTES // (max(vocabulary, 1) * element_size), _ALIGNMENT)
    slices = -(-tokens // fit)
    return min(tokens, -(-tokens // (slices * _ALIGNMENT)) * _ALIGNMENT)


def one_pass_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    tokens: int | None = None,
    otherwise: Callable[[], None] | None = None,
) -> Tensor:
    """As `linear_cross_entropy`, with one GEMM less where gradients are wanted.

    Args:
        hidden: `[s, b, H]`, see there.
        weight: `[V, H]`.
        target: `[s, b]` int64.
        mask: `[s, b]`, the loss of a token weighs as much as this times a factor of all; None for ones.
        group: tensor-parallel group; None for one rank.
        sequence_parallel: whether `hidden` is split along the sequence over `group`.
        tokens: tokens at a time; None lets `slice_size` choose.
        otherwise: called in a backward where the tokens weigh otherwise.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    wanted = torch.is_grad_enabled() and hidden.requires_grad and weight.requires_grad
    if not wanted:
        return chunked.linear_cross_entropy(hidden, weight, target, group, sequence_parallel)
    group, sequence_parallel = chunked.checked(hidden, weight, target, group, sequence_parallel)
    if mask is not None and mask.shape != target.shape:
        raise ValueError(f"mask must be {tuple(target.shape)}, got {tuple(mask.shape)}")
    loss: Tensor = _OnePass.apply(
        hidden, weight, target, mask, group, sequence_parallel, tokens, otherwise
    )
    return loss


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        mask: Tensor | None,
        group: dist.ProcessGroup | None,
        sequence_parallel: bool,
        tokens: int | None,
        otherwise: Callable[[], None] | None,
    ) -> Tensor:
        whole = gather_first(hidden, group) if sequence_parallel else hidden
        x = whole.detach().reshape(-1, whole.shape[-1])
        head = weight.detach()
        labels = target.reshape(-1).contiguous()
        count = x.shape[0]
        weighs = torch.ones(count, dtype=torch.float32, device=x.device)
        if mask is not None:
            weighs = mask.reshape(-1).to(torch.float32).contiguous()
        step = tokens or slice_size(count, head.shape[0], x.element_size())
        softmax = chunked.softmax_of(x)
        offset = head.shape[0] * (dist.get_rank(group) if group is not None else 0)
        buffer = x.new_empty(min(step, count), head.shape[0])
        lse, loss = torch.empty_like(weighs), torch.empty_like(weighs)
        dx = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        dw: Tensor | None = None
        for first in range(0, count, step):
            part = slice(first, min(first + step, count))
            logits = torch.mm(x[part], head.t(), out=buffer[: part.stop - first])
            largest = torch.full_like(lse[part], -torch.inf)
            total, predicted = torch.zeros_like(largest), torch.zeros_like(largest)
            softmax.statistics(logits, labels[part], largest, total, predicted, offset)
            lse[part], loss[part] = chunked.combine(
                offset, head.shape[0], labels[part], largest, total, predicted, group
            )
            softmax.gradient(logits, labels[part], lse[part], weighs[part], offset)
            chunked.product(dx[part], logits, head)
            if dw is None:
                dw = torch.empty(head.shape, dtype=torch.float32, device=x.device)
                chunked.product(dw, logits.t(), x[part])
            else:
                chunked.accumulate(dw, logits.t(), x[part])
        ctx.save_for_backward(hidden, weight, labels, lse, weighs, dx, dw)
        ctx.group, ctx.sequence_parallel, ctx.otherwise = group, sequence_parallel, otherwise
        return loss.view(target.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, lse, weighs, dx, dw = ctx.saved_tensors
        group, sequence_parallel = ctx.group, ctx.sequence_parallel
        dloss = grad.reshape(-1).to(torch.float32).contiguous()
        at = weighs.abs().argmax()
        factor = torch.where(weighs[at] == 0, 0.0, dloss[at] / weighs[at])
        near = _TOLERANCE * (factor * weighs).abs()
        if not bool(((dloss - factor * weighs).abs() <= near).all()):
            if ctx.otherwise is not None:
                ctx.otherwise()
            both = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
            del dx, dw
            return *chunked.gradients(
                hidden, weight, labels, lse, dloss, group, sequence_parallel, None, both
            ), *[None] * 6
        shape = (-1, *hidden.shape[1:])
        dhidden = chunked.reduce(
            (dx * factor).to(hidden.dtype).view(shape), group, sequence_parallel
        )
        main_grad = main_grads.of(weight)
        if main_grad is None:
            return dhidden, (dw * factor).to(weight.dtype), *[None] * 6
        if main_grad.dtype == torch.float32:
            # main_grad += factor dw, in one pass
            torch.addcmul(main_grad, dw, factor.expand(1, 1), out=main_grad)
        else:
            main_grad.add_(dw * factor)
        return dhidden, main_grads.dummy(weight), *[None] * 6
