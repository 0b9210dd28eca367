"""QKV split into queries, keys and values and rotated, in one pass each way (`hopper_rope.cu`).

TransformerEngine's kernel for it computes the sine of every angle in every layer; here sines and cosines are
computed once for all layers. Rotation of whole heads, the first half
with the second (Megatron's default), computed in FP32 and rounded to BF16 once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_fp8_ext.kernels import hopper

# Angles whose tables are kept: Megatron makes one tensor for each sequence length.
_KEPT = 4
_tables: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
HEADS = (64, 128, 256)


def tables(angles: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(cosines, sines) `[s, d / 2]` FP32 of Megatron's `rotary_pos_emb`, or (None, None).

    Args:
        angles: `[s, 1, 1, d]`; what is not the same angles twice is not for this kernel.
    """
    for known, cosine, sine in _tables:
        if known is angles:
            return cosine, sine
    cosine = sine = None
    if angles.dim() == 4 and angles.shape[1:3] == (1, 1) and angles.shape[3] in HEADS:
        first, second = angles[:, 0, 0].float().chunk(2, dim=-1)
        if torch.equal(first, second):
            cosine, sine = first.cos().contiguous(), first.sin().contiguous()
    _tables.insert(0, (angles, cosine, sine))
    del _tables[_KEPT:]
    return cosine, sine


def takes(qkv: Tensor, angles: Tensor, split: Sequence[int]) -> bool:
    """Whether the kernel serves this call."""
    head = angles.shape[-1]
    return (
        qkv.is_cuda
        and qkv.dtype is torch.bfloat16
        and qkv.dim() == 4
        and qkv.is_contiguous()
        and head in HEADS
        and len(split) == 3
        and split[0] % head == 0
        and split[1] == split[2] == head
        and angles.shape[0] >= qkv.shape[0]
        and not torch.cuda.is_current_stream_capturing()
        and hopper.reason(qkv.device.index) is None
        and tables(angles)[0] is not None
    )


def split_and_rotate(qkv: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries `[s, b, groups * q, d]`, keys and values `[s, b, groups, d]`.

    Args:
        qkv: `[s, b, groups, (q + 2) d]` BF16, contiguous.
        angles: Megatron's `rotary_pos_emb`, `[s, 1, 1, d]`.
    """
    cosine, sine = tables(angles)
    out: tuple[Tensor, Tensor, Tensor] = _Rotate.apply(qkv, cosine, sine)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, ...]:
        s, b, groups, width = qkv.shape
        head = 2 * cosine.shape[1]
        queries = width // head - 2
        parts = tuple(
            torch.empty((s, b, heads, head), dtype=qkv.dtype, device=qkv.device)
            for heads in (groups * queries, groups, groups)
        )
        hopper.rotate_qkv(qkv, parts, cosine, sine, groups, queries, backward=False)
        ctx.save_for_backward(cosine, sine)
        ctx.size = (s, b, groups, width)
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors
        parts = tuple(grad.contiguous() for grad in grads)
        qkv = torch.empty(ctx.size, dtype=parts[0].dtype, device=parts[0].device)
        groups, queries = ctx.size[2], ctx.size[3] // (2 * cosine.shape[1]) - 2
        hopper.rotate_qkv(qkv, parts, cosine, sine, groups, queries, backward=True)
        return qkv, None, None
