"""Collectives along the first dimension, on NCCL and on gloo (which has no reduce-scatter of its own)."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def gather_first(x: Tensor, group: Any) -> Tensor:
    """Return the ranks' `x` one after the other along dim 0."""
    out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def reduce_scatter_first(x: Tensor, group: Any) -> Tensor:
    """Sum over the ranks and return this rank's part of dim 0; `x` may be overwritten."""
    if dist.get_backend(group) == "nccl":
        out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
        dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
        return out
    dist.all_reduce(x, group=group)
    return x.chunk(group.size(), dim=0)[dist.get_rank(group)].contiguous()
