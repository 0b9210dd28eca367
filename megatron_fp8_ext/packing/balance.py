"""The packs of one global batch, spread over data-parallel ranks and micro-batches.

Which samples form the batch is decided elsewhere (`order`); nothing here changes it. Every rank gets the same
number of micro-batches, the fewest that best-fit decreasing finds; a rank may get an empty one. Ranks meet
once a step, at the gradient reduction, so what must be even is the sum over a rank's micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_fp8_ext.packing.bins import Integers, best_fit_decreasing

Schedule = list[list[list[int]]]
_ROUNDS = 200


@dataclass(frozen=True)
class Cost:
    """Time of a sample in units of one token's linear layers: `n + n * n / attention_length`.

    Attributes:
        attention_length: tokens at which a sample's causal attention costs as much as its linear layers.
            infinity counts tokens alone.
    """

    attention_length: float = float("inf")

    def of(self, length: int) -> float:
        """Return the cost of a sample of `length` tokens."""
        return length + length * length / self.attention_length


def attention_length(hidden: int, ffn: int, attention: int, key_value: int, gated: bool) -> float:
    """Return `Cost.attention_length` of a transformer layer.

    A token costs 2 FLOPs for each weight, and causal attention over n tokens 2 * n * `attention` FLOPs a
    token (scores and values, half of them masked).

    Args:
        hidden: hidden size.
        ffn: size of the feed-forward layer.
        attention: heads x channels of the queries.
        key_value: heads x channels of the keys.
        gated: whether the feed-forward layer has a gate (SwiGLU).
    """
    weights = hidden * (2 * attention + 2 * key_value) + hidden * ffn * (3 if gated else 2)
    return weights / attention


def schedule(
    lengths: Integers | Sequence[int], ranks: int, capacity: int, cost: Cost | None = None
) -> Schedule:
    """Return `result[rank][microbatch]`, the indexes of its samples; deterministic.

    Args:
        lengths: `[samples]`, tokens of each sample of one global batch, at most `capacity`.
        ranks: data-parallel size.
        capacity: tokens of a pack.
        cost: what is to be even between ranks; tokens alone by default.
    """
    lengths = np.asarray(lengths)
    weigh = (cost or Cost()).of
    sizes = [int(n) for n in lengths]
    costs = [weigh(n) for n in sizes]
    packs = best_fit_decreasing(lengths, capacity)
    microbatches = max(-(-len(packs) // ranks), 1)
    tight = _Plan(sizes, costs, ranks, microbatches, capacity)
    tight.deal([[int(i) for i in packs[p]] for p in range(len(packs))])
    tight.improve()
    plans = [tight]
    spread = _Plan(sizes, costs, ranks, microbatches, capacity)
    if spread.spread():
        spread.improve()
        plans.append(spread)
    return min(plans, key=lambda plan: plan.slowest).packs


def deal_packs(costs: Sequence[float], ranks: int, microbatches: int) -> list[list[int]]:
    """Return `result[rank]`, `microbatches` fixed packs each, with even costs.

    Args:
        costs: of `ranks * microbatches` packs.
        ranks: data-parallel size.
        microbatches: packs of each rank.
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    total = [0.0] * ranks
    for pack in sorted(range(len(costs)), key=lambda pack: -costs[pack]):
        rank = min((r for r in range(ranks) if len(dealt[r]) < microbatches), key=total.__getitem__)
        dealt[rank].append(pack)
        total[rank] += costs[pack]
    return dealt


class _Plan:
    """Packs of each rank under construction, with their room and the ranks' cost."""

    def __init__(
        self, sizes: list[int], costs: list[float], ranks: int, microbatches: int, capacity: int
    ) -> None:
        self.sizes, self.costs = sizes, costs
        self.packs: Schedule = [[[] for _ in range(microbatches)] for _ in range(ranks)]
        self.room = [[capacity] * microbatches for _ in range(ranks)]
        self.cost = [0.0] * ranks

    @property
    def slowest(self) -> float:
        return max(self.cost)

    def add(self, sample: int, rank: int, pack: int) -> None:
        self.packs[rank][pack].append(sample)
        self.room[rank][pack] -= self.sizes[sample]
        self.cost[rank] += self.costs[sample]

    def remove(self, sample: int, rank: int, pack: int) -> None:
        self.packs[rank][pack].remove(sample)
        self.room[rank][pack] += self.sizes[sample]
        self.cost[rank] -= self.costs[sample]

    def deal(self, packs: list[list[int]]) -> None:
        """Give whole packs, the costliest first, to the cheapest rank that has an empty one."""
        free = [len(rooms) for rooms in self.room]
        for pack in sorted(packs, key=lambda pack: -sum(self.costs[i] for i in pack)):
            rank = min((r for r in range(len(free)) if free[r]), key=lambda r: self.cost[r])
            free[rank] -= 1
            for sample in pack:
                self.add(sample, rank, free[rank])

    def spread(self) -> bool:
        """Give samples, the longest first, to the cheapest rank where one fits; False if it cannot."""
        for sample in sorted(range(len(self.sizes)), key=lambda i: (-self.sizes[i], i)):
            for rank in sorted(range(len(self.cost)), key=lambda r: self.cost[r]):
                pack = self._best_fit(rank, self.sizes[sample])
                if pack is not None:
                    self.add(sample, rank, pack)
                    break
            else:
                return False
        return True

    def _best_fit(self, rank: int, size: int) -> int | None:
        fitting = [(room, p) for p, room in enumerate(self.room[rank]) if room >= size]
        return min(fitting)[1] if fitting else None

    def improve(self) -> None:
        """Move or swap samples between the slowest rank and another while that makes it faster."""
        for _ in range(_ROUNDS):
            slow = max(range(len(self.cost)), key=lambda r: self.cost[r])
            found = self._best_exchange(slow)
            if found is None:
                return
            a, pack_a, b, other, pack_b = found
            self.remove(a, slow, pack_a)
            if b is not None:
                self.remove(b, other, pack_b)
                self.add(b, slow, pack_a)
            self.add(a, other, pack_b)

    def _best_exchange(self, slow: int) -> tuple[int, int, int | None, int, int] | None:
        """Return the exchange after which the slower of the two ranks is fastest, if it gains."""
        best, found = self.cost[slow] * (1 - 1e-6), None
        for other in range(len(self.cost)):
            gap = self.cost[slow] - self.cost[other]
            if other == slow or gap <= 0:
                continue
            for pack_a, mine in enumerate(self.packs[slow]):
                for a in mine:
                    for pack_b, theirs in enumerate(self.packs[other]):
                        for b in (None, *theirs):
                            moved = self.costs[a] - (0.0 if b is None else self.costs[b])
                            if not 0 < moved < gap:
                                continue
                            after = max(self.cost[slow] - moved, self.cost[other] + moved)
                            grow = self.sizes[a] - (0 if b is None else self.sizes[b])
                            fits = (
                                grow <= self.room[other][pack_b]
                                and -grow <= self.room[slow][pack_a]
                            )
                            if after < best and fits:
                                best, found = after, (a, pack_a, b, other, pack_b)
        return found
