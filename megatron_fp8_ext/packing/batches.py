"""From samples to micro-batches: the packs of a rank in each step, as arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_fp8_ext.packing.balance import Cost, deal_packs, schedule
from megatron_fp8_ext.packing.bins import Integers, best_fit_decreasing
from megatron_fp8_ext.packing.order import EpochOrder

Scope = Literal["batch", "epoch"]
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How packs are cut for one run.

    Attributes:
        capacity: tokens of a full pack over all context-parallel ranks (`--seq-length`).
        multiple: packs are padded to a multiple of it, with a masked sequence of its own.
        ranks: data-parallel size.
        batch: samples of a global batch; packs of it where the scope is `epoch`.
        context: context-parallel size; each sample is padded to a multiple of 2 x it if above 1.
        fixed: pad every pack to the capacity (pipeline stages exchange one shape).
        scope: pack inside each global batch, or the whole epoch once.
        cost: what is even between ranks.
    """

    capacity: int
    multiple: int
    ranks: int
    batch: int
    context: int = 1
    fixed: bool = False
    scope: Scope = "batch"
    cost: Cost = Cost()  # noqa: RUF009  # frozen

    def padded(self, lengths: Integers) -> npt.NDArray[np.int64]:
        """Return the lengths that context parallelism asks for."""
        step = 2 * self.context if self.context > 1 else 1
        return -(-np.asarray(lengths, np.int64) // step) * step


class Plan:
    """Which samples each rank computes in each micro-batch of each step: a pure function of `consumed`.

    Args:
        lengths: `[samples]`, tokens of each.
        layout: see Layout.
        seed: of the epoch order.
    """

    def __init__(self, lengths: Integers, layout: Layout, seed: int) -> None:
        self.layout = layout
        self._lengths = layout.padded(lengths)
        self._epoch = None
        count = len(lengths)
        if layout.scope == "epoch":
            self._epoch = best_fit_decreasing(self._lengths, layout.capacity)
            count = len(self._epoch)
        self.order = EpochOrder(count, seed)
        self._schedule = functools.lru_cache(maxsize=4)(self._make)

    def samples(self, consumed: int) -> npt.NDArray[np.int64]:
        """Return the samples of the global batch that follows `consumed` (packs, if scope is epoch)."""
        taken = self.order.take(consumed, self.layout.batch)
        if self._epoch is None:
            return taken
        return np.concatenate([self._epoch[int(pack)] for pack in taken])

    def step(self, consumed: int, rank: int) -> list[list[int]]:
        """Return the samples of each micro-batch of `rank`; as many micro-batches on every rank."""
        return self._schedule(consumed)[rank]

    def _make(self, consumed: int) -> list[list[list[int]]]:
        layout = self.layout
        taken = self.order.take(consumed, layout.batch)
        if self._epoch is None:
            sizes = self._lengths[taken]
            plan = schedule(sizes, layout.ranks, layout.capacity, layout.cost)
            return [[[int(taken[i]) for i in pack] for pack in packs] for packs in plan]
        packs = [self._epoch[int(pack)].tolist() for pack in taken]
        costs = [sum(layout.cost.of(int(self._lengths[i])) for i in pack) for pack in packs]
        dealt = deal_packs(costs, layout.ranks, len(packs) // layout.ranks)
        return [[packs[p] for p in mine] for mine in dealt]


@dataclass(frozen=True)
class MicroBatch:
    """One pack, or this context-parallel rank's part of it.

    Attributes:
        tokens: `[t]` int64.
        labels: `[t]` int64, the next token of the same sample.
        positions: `[t]` int64, from 0 in each sample.
        weights: `[t]` float32, see sft/loss.py; 0 for padding.
        units: `[t]` int64.
        cuts: `[sequences + 1]` int32 cu_seqlens of the whole pack, padding included.
        lengths: `[samples]` int64, tokens of the real sequences.
    """

    tokens: Array
    labels: Array
    positions: Array
    weights: Array
    units: Array
    cuts: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, padding included."""
        return int(np.max(np.diff(self.cuts)))


Weigh = Callable[[npt.NDArray[np.bool_]], tuple[Array, Array]]


def assemble(
    samples: Sequence[tuple[Array, npt.NDArray[np.bool_]]], weigh: Weigh, layout: Layout
) -> MicroBatch:
    """Lay samples (tokens, mask) one after another, and padding behind them as sequences of its own."""
    lengths = np.array([len(tokens) for tokens, _ in samples], np.int64)
    ends = np.cumsum(layout.padded(lengths))
    real = int(ends[-1]) if len(ends) else 0
    size = (
        layout.capacity if layout.fixed else max(-(-real // layout.multiple), 1) * layout.multiple
    )
    tokens, labels, positions, units = (np.zeros(size, np.int64) for _ in range(4))
    weights = np.zeros(size, np.float32)
    starts = [0, *ends.tolist()][:-1]
    for start, end, (ids, mask) in zip(starts, ends.tolist(), samples, strict=True):
        last = start + len(ids)
        tokens[start:last] = ids
        labels[start : last - 1] = ids[1:]
        positions[start:end] = np.arange(end - start)
        weights[start : last - 1], units[start : last - 1] = weigh(mask[1:])
    # One sequence, or several where a fixed shape leaves a lot to fill: attention over them is wasted.
    padding = [*range(real + layout.multiple, size, layout.multiple), size] if real < size else []
    for start, end in zip([real, *padding], padding, strict=False):
        positions[start:end] = np.arange(end - start)
    cuts = np.array([0, *ends.tolist(), *padding], np.int32)
    return MicroBatch(tokens, labels, positions, weights, units, cuts, lengths)


def context_parallel_part(cuts: Array, parts: int, part: int) -> npt.NDArray[np.int64]:
    """Return which tokens of a pack a context-parallel rank holds, `[total / parts]`.

    TransformerEngine's zigzag: each sequence is cut into 2 x parts chunks, and a rank holds its own one and
    the mirror of it, so that causal attention is even.
    """
    pieces = []
    for start, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        chunk = (end - start) // (2 * parts)
        mirror = end - (part + 1) * chunk
        pieces += [np.arange(start + part * chunk, start + (part + 1) * chunk)]
        pieces += [np.arange(mirror, mirror + chunk)]
    return np.concatenate(pieces)


def on_context_parallel_rank(batch: MicroBatch, parts: int, part: int) -> MicroBatch:
    """Return the part of a pack that a context-parallel rank computes."""
    if parts == 1:
        return batch
    held = context_parallel_part(batch.cuts, parts, part)
    return MicroBatch(
        batch.tokens[held],
        batch.labels[held],
        batch.positions[held],
        batch.weights[held],
        batch.units[held],
        batch.cuts,
        batch.lengths,
    )
