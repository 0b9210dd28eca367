"""Softmax over a vocabulary that arrives in slices: running statistics, then the gradient in place.

Both functions work on a slice of logits `[N, V]` that starts at vocabulary index `first`. `softmax_torch`
has the same two for machines without Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Logits that one program holds at a time.
_WIDTH = 4096


@triton.jit
def _statistics_kernel(  # type: ignore[no-untyped-def]
    logits, target, largest, total, predicted, first, V, stride, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    m = tl.load(largest + row)
    s = tl.load(total + row)
    for start in tl.range(0, V, WIDTH):
        column = start + tl.arange(0, WIDTH)
        x = tl.load(logits + row * stride + column, mask=column < V, other=float("-inf"))
        x = x.to(tl.float32)
        higher = tl.maximum(m, tl.max(x, axis=0))
        # A vocabulary that starts with nothing but -inf must not become inf - inf.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        s = s * tl.exp(m - shift) + tl.sum(tl.exp(x - shift), axis=0)
        m = higher
    tl.store(largest + row, m)
    tl.store(total + row, s)
    index = tl.load(target + row) - first
    mine = (index >= 0) & (index < V)
    value = tl.load(logits + row * stride + tl.where(mine, index, 0)).to(tl.float32)
    tl.store(predicted + row, value, mask=mine)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits, target, lse, dloss, first, V, stride, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * WIDTH
    column = start + tl.arange(0, WIDTH)
    at = logits + row * stride + column
    x = tl.load(at, mask=column < V, other=float("-inf")).to(tl.float32)
    p = tl.exp(x - tl.load(lse + row))
    index = tl.load(target + row) - first
    p = tl.where(column == index, p - 1.0, p)
    gradient = p * tl.load(dloss + row)
    tl.store(at, gradient.to(logits.dtype.element_ty), mask=column < V)


def _grid_arguments(logits: Tensor) -> tuple[int, int, int]:
    rows, columns = logits.shape
    if logits.stride(1) != 1:
        raise ValueError("a row of logits must lie in one piece")
    return int(rows), int(columns), int(logits.stride(0))


def statistics(
    logits: Tensor, target: Tensor, largest: Tensor, total: Tensor, predicted: Tensor, first: int
) -> None:
    """Take one slice into the running statistics, in place.

    Args:
        logits: `[N, V]` bfloat16 or float32, columns `first` to `first + V` of the vocabulary.
        target: `[N]` int64, indices in the whole vocabulary.
        largest: `[N]` FP32, maximum so far (start: -inf).
        total: `[N]` FP32, sum of exp(logit - largest) so far (start: 0).
        predicted: `[N]` FP32, the target's logit, written where the target lies in this slice.
        first: see `logits`.
    """
    rows, columns, stride = _grid_arguments(logits)
    _statistics_kernel[(rows,)](
        logits, target, largest, total, predicted, first, columns, stride,
        WIDTH=min(_WIDTH, int(triton.next_power_of_2(columns))), num_warps=8,
    )  # fmt: skip


def gradient(logits: Tensor, target: Tensor, lse: Tensor, dloss: Tensor, first: int) -> None:
    """Overwrite a slice of logits by dloss (softmax - onehot(target)).

    Args:
        logits: as in `statistics`.
        target: `[N]` int64.
        lse: `[N]` FP32, log of the sum of exponentials over the whole vocabulary.
        dloss: `[N]` FP32.
        first: as in `statistics`.
    """
    rows, columns, stride = _grid_arguments(logits)
    width = min(_WIDTH, int(triton.next_power_of_2(columns)))
    _gradient_kernel[(rows, triton.cdiv(columns, width))](
        logits, target, lse, dloss, first, columns, stride, WIDTH=width, num_warps=8
    )
