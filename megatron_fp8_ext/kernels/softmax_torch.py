"""The two functions of `softmax` in torch, for any device."""

from __future__ import annotations

import torch
from torch import Tensor


def statistics(
    logits: Tensor, target: Tensor, largest: Tensor, total: Tensor, predicted: Tensor, first: int
) -> None:
    """As `softmax.statistics`."""
    x = logits.float()
    higher = torch.maximum(largest, x.amax(dim=1))
    shift = higher.masked_fill(higher == -torch.inf, 0.0)
    total.mul_(torch.exp(largest - shift)).add_(torch.exp(x - shift[:, None]).sum(dim=1))
    largest.copy_(higher)
    index = target - first
    mine = (index >= 0) & (index < logits.shape[1])
    value = x.gather(1, index.masked_fill(~mine, 0)[:, None])[:, 0]
    predicted.copy_(torch.where(mine, value, predicted))


def gradient(logits: Tensor, target: Tensor, lse: Tensor, dloss: Tensor, first: int) -> None:
    """As `softmax.gradient`."""
    p = torch.exp(logits.float() - lse[:, None])
    index = target - first
    mine = (index >= 0) & (index < logits.shape[1])
    p.scatter_add_(1, index.masked_fill(~mine, 0)[:, None], -mine.float()[:, None])
    logits.copy_(p.mul_(dloss[:, None]))
