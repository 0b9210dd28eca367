"""Exact attention inside each sequence of a pack, for Megatron's local layers.

`DotProductAttention` refuses packed sequences and context parallelism; TransformerEngine has both, but only
on a GPU. Here each sequence attends to itself through torch's scaled_dot_product_attention; under
context parallelism keys and values are gathered from all ranks, and each rank computes its own queries.
"""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import run
from megatron_fp8_ext.packing.batches import context_parallel_part


class _Gather(torch.autograd.Function):
    """`[t, ...]` of each rank -> `[ranks * t, ...]`; the gradients of all ranks are summed."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(ctx.group.size())[ctx.group.rank()], None


def block_diagonal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cuts: list[int],
    scale: float,
    group: Any = None,
) -> torch.Tensor:
    """Return causal attention inside each sequence, `[t, heads, channels]`.

    Args:
        query: `[t, heads, channels]`; under context parallelism this rank's tokens, in zigzag order.
        key: `[t, groups, channels]`.
        value: as key.
        cuts: cu_seqlens of the whole pack.
        scale: of the scores.
        group: context-parallel process group; None or of size one without.
    """
    parts = 1 if group is None else group.size()
    if parts == 1:
        pieces = [
            _attend(query[a:b], key[a:b], value[a:b], scale, None)
            for a, b in itertools.pairwise(cuts)
            if b > a
        ]
        return torch.cat(pieces)
    import numpy as np

    bounds = np.asarray(cuts)
    held = [torch.from_numpy(context_parallel_part(bounds, parts, r)) for r in range(parts)]
    mine = held[group.rank()].to(query.device)
    order = torch.argsort(torch.cat(held)).to(query.device)
    keys, values = (_Gather.apply(x, group)[order] for x in (key, value))
    pieces = []
    for a, b in itertools.pairwise(cuts):
        rows = query[a // parts : b // parts]
        at = mine[a // parts : b // parts]
        allowed = at[:, None] >= torch.arange(a, b, device=at.device)[None, :]
        pieces.append(_attend(rows, keys[a:b], values[a:b], scale, allowed))
    return torch.cat(pieces)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, allowed: Any
) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=allowed,
        is_causal=allowed is None,
        scale=scale,
        enable_gqa=q.size(1) != k.size(1),
    )
    return out.squeeze(0).transpose(0, 1)


def in_local_layers(module: ModuleType) -> None:
    """`DotProductAttention` takes packed sequences, and context parallelism with them."""
    original = module.DotProductAttention

    class DotProductAttention(original):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            size, config.context_parallel_size = config.context_parallel_size, 1
            try:
                super().__init__(config, *args, **kwargs)
            finally:
                config.context_parallel_size = size

        def forward(
            self,
            query: Any,
            key: Any,
            value: Any,
            attention_mask: Any,
            attn_mask_type: Any = None,
            attention_bias: Any = None,
            packed_seq_params: Any = None,
            **kwargs: Any,
        ) -> Any:
            packed = packed_seq_params is not None
            if not packed and self.config.context_parallel_size == 1:
                return super().forward(
                    query,
                    key,
                    value,
                    attention_mask,
                    attn_mask_type=attn_mask_type,
                    attention_bias=attention_bias,
                    **kwargs,
                )
            _refuse(self)
            group = _context_group()
            # What the parent's softmax would multiply back in.
            scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1)
            if packed:
                cuts = packed_seq_params.cu_seqlens_q.tolist()
                out = block_diagonal(query, key, value, cuts, scale, group)
                return out.reshape(out.size(0), -1)
            cuts = [0, query.size(0) * self.config.context_parallel_size]
            rows = [
                block_diagonal(query[:, b], key[:, b], value[:, b], cuts, scale, group)
                for b in range(query.size(1))
            ]
            out = torch.stack(rows, dim=1)
            return out.reshape(*out.shape[:2], -1)

    DotProductAttention.__qualname__ = original.__qualname__
    module.DotProductAttention = DotProductAttention  # type: ignore[attr-defined]


def _context_group() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_group()


def _refuse(layer: Any) -> None:
    """Say what this attention does not do, rather than leave it out."""
    config = layer.config
    for wrong, flag in (
        (layer.attention_dropout.p > 0 and layer.training, "--attention-dropout above 0"),
        (config.window_size is not None, "--window-size"),
        (getattr(config, "softmax_type", "vanilla") != "vanilla", "--softmax-type"),
        (str(layer.attn_mask_type).split(".")[-1] == "no_mask", "attention that is not causal"),
    ):
        if wrong:
            raise run.stop(
                UserError(f"packed or context-parallel attention without a GPU has no {flag}")
            )
