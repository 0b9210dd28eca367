"""LM head and cross-entropy without the logits of a whole vocabulary.

The vocabulary is walked in slices: one slice of logits `[N, slice]` lives at a time, the forward keeps
running softmax statistics (12 bytes a token), and the backward computes each slice again, turns it into its
gradient in place and multiplies it twice. Four head GEMMs instead of three, and exact for any loss per
token. Slices of the vocabulary rather than of the tokens, because then each row of the weight's gradient is
written once, straight into Megatron's `main_grad`, and what accumulates is only `[N, H]`.

Shapes: N tokens (sequence x batch), H hidden, V the rows of the head on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp8_ext.fp8.collectives import gather_first, reduce_scatter_first
from megatron_fp8_ext.kernels import main_grad as main_grads
from megatron_fp8_ext.kernels import support

# Bytes of the slice of logits; a GEMM of this size fills a Hopper GPU.
SLICE_BYTES = 256 * 2**20
_MIN_SLICE, _ALIGNMENT = 1024, 128


def slice_size(tokens: int, vocabulary: int, element_size: int) -> int:
    """Return how many rows of the head are taken at a time."""
    fit = SLICE_BYTES // (max(tokens, 1) * element_size)
    return min(vocabulary, max(fit // _ALIGNMENT * _ALIGNMENT, _MIN_SLICE))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    rows: int | None = None,
) -> Tensor:
    """Return the loss of each token, `[s, b]` FP32, differentiable in `hidden` and `weight`.

    A target outside of the vocabulary gets what Megatron gives it (log-sum-exp above the maximum): it is
    for the loss mask to drop. If `weight` has Megatron's `main_grad`, its gradient is added there in the
    backward, as under gradient accumulation fusion, but with torch's GEMM instead of apex.

    Args:
        hidden: `[s, b, H]` bfloat16 or float32; under sequence parallelism this rank's `[s / tp, b, H]`.
        weight: `[V, H]` of the same dtype: this rank's part of the vocabulary.
        target: `[s, b]` int64, indices in the whole vocabulary.
        group: tensor-parallel group; None for one rank.
        sequence_parallel: whether `hidden` is split along the sequence over `group`.
        rows: rows of `weight` at a time; None lets `slice_size` choose.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    group, sequence_parallel = checked(hidden, weight, target, group, sequence_parallel)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, target, group, sequence_parallel, rows)
    return loss


def checked(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None,
    sequence_parallel: bool,
) -> tuple[dist.ProcessGroup | None, bool]:
    """Check the arguments of `linear_cross_entropy`; a group of one is none.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    parts = group.size() if group is not None else 1
    length = hidden.shape[0] * (parts if sequence_parallel else 1)
    if hidden.dim() != 3 or tuple(target.shape) != (length, hidden.shape[1]):
        raise ValueError(
            f"target must be [{length}, {hidden.shape[1]}] for hidden {tuple(hidden.shape)}, "
            f"got {tuple(target.shape)}"
        )
    if weight.dtype != hidden.dtype or weight.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"weight {weight.dtype} {tuple(weight.shape)} does not go with hidden "
            f"{hidden.dtype} {tuple(hidden.shape)}"
        )
    return (None, False) if parts == 1 else (group, sequence_parallel)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        group: dist.ProcessGroup | None,
        sequence_parallel: bool,
        rows: int | None,
    ) -> Tensor:
        whole = gather_first(hidden, group) if sequence_parallel else hidden
        x = whole.reshape(-1, whole.shape[-1])
        labels = target.reshape(-1).contiguous()
        slices = _Slices(x, weight, group, rows)
        largest = x.new_full((x.shape[0],), -torch.inf, dtype=torch.float32)
        total, predicted = torch.zeros_like(largest), torch.zeros_like(largest)
        for first, part in slices:
            logits = slices.logits(x, part)
            slices.statistics(logits, labels, largest, total, predicted, slices.offset + first)
        size = weight.shape[0]
        lse, loss = combine(slices.offset, size, labels, largest, total, predicted, group)
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.group, ctx.sequence_parallel, ctx.rows = group, sequence_parallel, rows
        return loss.view(target.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, lse = ctx.saved_tensors
        dloss = grad.reshape(-1).to(torch.float32).contiguous()
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        made = gradients(
            hidden, weight, labels, lse, dloss, ctx.group, ctx.sequence_parallel, ctx.rows, wanted
        )
        return *made, None, None, None, None


def gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    dloss: Tensor,
    group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    rows: int | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the logits again, slice by slice of the vocabulary; return the gradients of hidden and head.

    Args:
        hidden: as the forward got it.
        weight: likewise.
        labels: `[N]`.
        lse: `[N]` FP32, log of the sum of exponentials over the whole vocabulary.
        dloss: `[N]` FP32, gradient of each token's loss.
        group: see `linear_cross_entropy`.
        sequence_parallel: likewise.
        rows: likewise.
        wanted: whether the gradient of hidden and of the head are.
    """
    whole = gather_first(hidden, group) if sequence_parallel else hidden
    x = whole.reshape(-1, whole.shape[-1])
    slices = _Slices(x, weight, group, rows)
    dx = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if wanted[0] else None
    main_grad = main_grads.of(weight) if wanted[1] else None
    dw = torch.empty_like(weight) if wanted[1] and main_grad is None else None
    for first, part in slices:
        logits = slices.logits(x, part)
        slices.gradient(logits, labels, lse, dloss, slices.offset + first)
        if dx is not None:
            accumulate(dx, logits, part)
        if main_grad is not None:
            accumulate(main_grad[first : first + part.shape[0]], logits.t(), x)
        elif dw is not None:
            torch.mm(logits.t(), x, out=dw[first : first + part.shape[0]])
    if main_grad is not None:
        dw = main_grads.dummy(weight)
    dhidden = None
    if dx is not None:
        dhidden = reduce(dx.to(hidden.dtype).view(whole.shape), group, sequence_parallel)
    return dhidden, dw


def softmax_of(x: Tensor) -> Any:
    """The module with the two softmax functions that run where `x` is."""
    if x.is_cuda and support.gap(x.device, fp8=False) is None:
        from megatron_fp8_ext.kernels import softmax

        return softmax
    from megatron_fp8_ext.kernels import softmax_torch

    return softmax_torch


class _Slices:
    """The slices of this rank's part of the vocabulary, and one buffer for their logits."""

    def __init__(
        self, x: Tensor, weight: Tensor, group: dist.ProcessGroup | None, rows: int | None
    ) -> None:
        self.weight = weight.detach()
        self.offset = weight.shape[0] * (dist.get_rank(group) if group is not None else 0)
        self.rows = rows or slice_size(x.shape[0], weight.shape[0], x.element_size())
        self.buffer = x.new_empty(x.shape[0] * min(self.rows, weight.shape[0]))
        softmax = softmax_of(x)
        self.statistics, self.gradient = softmax.statistics, softmax.gradient

    def __iter__(self) -> Any:
        for first in range(0, self.weight.shape[0], self.rows):
            yield first, self.weight[first : first + self.rows]

    def logits(self, x: Tensor, part: Tensor) -> Tensor:
        """`[N, slice]` in the dtype of `x`, in the one buffer."""
        out = self.buffer[: x.shape[0] * part.shape[0]].view(x.shape[0], part.shape[0])
        return torch.mm(x.detach(), part.t(), out=out)


def combine(
    offset: int,
    size: int,
    labels: Tensor,
    largest: Tensor,
    total: Tensor,
    predicted: Tensor,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """(log of the sum of exponentials, loss), `[N]` each, over the whole vocabulary.

    `offset` and `size` are of this rank's part of it.
    """
    own_largest = largest
    if group is not None:
        largest = largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    index = labels - offset
    mine = (index >= 0) & (index < size)
    sums = torch.stack(
        (total * torch.exp(own_largest - largest), torch.where(mine, predicted - largest, 0.0))
    )
    if group is not None:
        dist.all_reduce(sums, group=group)
    log_total = torch.log(sums[0])
    return largest + log_total, log_total - sums[1]


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, with the products summed in the precision of `out` where torch can.

    Args:
        out: `[n, m]`.
        a: `[n, k]`.
        b: `[k, m]` of the same dtype as `a`.
    """
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif out.is_cuda and _GEMM_WRITES_FP32:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif out.is_cuda:
        out.add_(torch.mm(a, b))
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b, with the products summed in the precision of `out` where torch can (`accumulate`)."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda and _GEMM_WRITES_FP32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif out.is_cuda:
        out.copy_(torch.mm(a, b))
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


_GEMM_WRITES_FP32 = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


def reduce(dx: Tensor, group: Any, sequence_parallel: bool) -> Tensor:
    """Sum over the ranks; under sequence parallelism this rank's part of dim 0."""
    if group is None:
        return dx
    if sequence_parallel:
        return reduce_scatter_first(dx, group)
    dist.all_reduce(dx, group=group)
    return dx
