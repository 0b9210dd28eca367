"""Fill and balance of two packers on one length distribution, side by side.

The other packer is what slime does at the commit InfiR2 pins: the batch is dealt to the ranks in turn, each
rank counts its packs by first fit, and all take the largest count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_fp8_ext.packing.balance import Cost, schedule

# InfiR2's SFT settings: samples a batch, tokens a micro-batch. The lengths of its data are not
# published; a lognormal with this median and sigma (mean 8 k) is our assumption.
CAPACITY, MEDIAN, SIGMA = 32768, 6000, 0.8


@dataclass(frozen=True)
class Balance:
    """Means over the simulated steps.

    Attributes:
        fill: tokens / (micro-batches x ranks x capacity).
        tokens: tokens of the mean rank / tokens of the fullest.
        cost: the same for tokens plus attention.
        microbatches: of each rank.
    """

    fill: float
    tokens: float
    cost: float
    microbatches: float


def lognormal_lengths(
    samples: int, seed: int, capacity: int = CAPACITY, median: float = MEDIAN, sigma: float = SIGMA
) -> npt.NDArray[np.int64]:
    """Return `[samples]` lengths between 16 and `capacity` tokens."""
    normal = np.random.Generator(np.random.PCG64(seed)).normal(np.log(median), sigma, samples)
    return np.clip(np.exp(normal).astype(np.int64), 16, capacity)


def _first_fit(sizes: Sequence[int], capacity: int) -> int:
    rooms: list[int] = []
    for size in sizes:
        at = next((i for i, room in enumerate(rooms) if room >= size), None)
        if at is None:
            rooms.append(capacity - size)
        else:
            rooms[at] -= size
    return len(rooms)


def first_fit_step(
    sizes: Sequence[int], ranks: int, capacity: int, cost: Cost
) -> tuple[float, float, float, int]:
    """Return (fill, token balance, cost balance, micro-batches) of a strided split and first fit."""
    parts = [list(sizes[rank::ranks]) for rank in range(ranks)]
    count = max(_first_fit(part, capacity) for part in parts)
    return _measure(parts, count, ranks, capacity, cost)


def scheduled_step(
    sizes: Sequence[int], ranks: int, capacity: int, cost: Cost
) -> tuple[float, float, float, int]:
    """Return the same four of `balance.schedule`."""
    plan = schedule(sizes, ranks, capacity, cost)
    parts = [[sizes[i] for pack in packs for i in pack] for packs in plan]
    return _measure(parts, len(plan[0]), ranks, capacity, cost)


def _measure(
    parts: list[list[int]], count: int, ranks: int, capacity: int, cost: Cost
) -> tuple[float, float, float, int]:
    tokens = [sum(part) for part in parts]
    costs = [sum(cost.of(n) for n in part) for part in parts]
    fill = sum(tokens) / (count * ranks * capacity)
    return (
        fill,
        sum(tokens) / ranks / max(tokens),
        sum(costs) / ranks / max(costs),
        count,
    )


def simulate(
    lengths: npt.NDArray[np.int64], batch: int, ranks: int, capacity: int, cost: Cost
) -> tuple[Balance, Balance]:
    """Return (first fit, ours) over `len(lengths) // batch` steps."""
    rows: tuple[list[tuple[float, ...]], list[tuple[float, ...]]] = ([], [])
    for start in range(0, len(lengths) - batch + 1, batch):
        sizes = lengths[start : start + batch].tolist()
        for row, step in zip(rows, (first_fit_step, scheduled_step), strict=True):
            row.append(step(sizes, ranks, capacity, cost))
    means = [np.mean(row, axis=0).tolist() for row in rows]
    return Balance(*means[0]), Balance(*means[1])
