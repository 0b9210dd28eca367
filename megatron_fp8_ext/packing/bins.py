"""Best-fit decreasing bin packing over integer lengths, at more than a million lengths a second.

Equal lengths are placed together. If the tightest bin that takes a sample of length L has room r, the next
samples of length L go into that same bin (its room only got tighter) until it holds r // L of them, so a
whole class of bins with equal room is filled in one step, and the work grows with the number of distinct
lengths rather than with the number of samples. The packs are those of textbook best-fit decreasing
(tests/unit/test_bins.py compares them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_fp8_ext.errors import UserError

Integers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Packs:
    """Packs as one permutation of the samples and its cuts.

    Attributes:
        samples: `[samples]` int64; indexes into the lengths, pack by pack, longest first in each.
        cuts: `[packs + 1]` int64; pack i holds `samples[cuts[i]:cuts[i + 1]]`.
    """

    samples: npt.NDArray[np.int64]
    cuts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def __getitem__(self, pack: int) -> npt.NDArray[np.int64]:
        return self.samples[self.cuts[pack] : self.cuts[pack + 1]]

    def loads(self, lengths: Integers) -> npt.NDArray[np.int64]:
        """Return the tokens of each pack, `[packs]`."""
        sums = np.concatenate(([0], np.cumsum(lengths[self.samples], dtype=np.int64)))
        return np.asarray(sums[self.cuts[1:]] - sums[self.cuts[:-1]])


def best_fit_decreasing(lengths: Integers | Sequence[int], capacity: int) -> Packs:
    """Pack samples of the given lengths into as few bins of `capacity` tokens as best fit finds.

    Args:
        lengths: `[samples]`, tokens of each, at least 1.
        capacity: tokens of a bin.

    Raises:
        UserError: a length below 1 or above the capacity.
    """
    lengths = np.asarray(lengths)
    if len(lengths) == 0:
        return Packs(np.zeros(0, np.int64), np.zeros(1, np.int64))
    low, high = int(np.min(lengths)), int(np.max(lengths))
    if low < 1 or high > capacity:
        which = int(np.argmin(lengths) if low < 1 else np.argmax(lengths))
        raise UserError(
            f"sample {which} has {low if low < 1 else high} tokens, and a pack takes 1 to {capacity}"
        )
    counts = np.bincount(lengths)
    # Longest first. A stable sort of 16-bit numbers is a radix sort.
    narrow = lengths.astype(np.uint16 if high < 2**16 else np.uint32)
    order = np.argsort(narrow, kind="stable")[::-1]
    distinct = np.flatnonzero(counts)[::-1]
    bins = np.asarray(_place(distinct.tolist(), counts[distinct].tolist(), capacity))
    by_bin = np.argsort(bins, kind="stable")
    cuts = np.concatenate(([0], np.cumsum(np.bincount(bins)))).astype(np.int64)
    return Packs(order[by_bin].astype(np.int64), cuts)


def _place(distinct: list[int], counts: list[int], capacity: int) -> list[int]:
    """Return the bin of each sample, longest sample first."""
    rooms: dict[int, list[int]] = {}  # room -> the bins that have it
    nonempty = 0  # bit r is set where some bin has room r
    placed: list[int] = []
    opened = 0

    def put(bins: list[int], room: int) -> None:
        nonlocal nonempty
        if room in rooms:
            rooms[room] += bins
        else:
            rooms[room] = bins
            nonempty |= 1 << room

    for length, left in zip(distinct, counts, strict=True):
        while left:
            fitting = nonempty >> length
            if not fitting:
                break
            room = length + (fitting & -fitting).bit_length() - 1
            bins = rooms[room]
            each = room // length
            whole = min(left // each, len(bins))
            if whole == len(bins):
                filled = bins
                del rooms[room]
                nonempty ^= 1 << room
            else:
                filled = bins[-whole:] if whole else []
                del bins[len(bins) - whole :]
            if whole:
                placed += filled * each
                left -= whole * each
                put(filled, room - each * length)
            elif left:  # fewer samples than one bin takes
                last = bins.pop()
                if not bins:
                    del rooms[room]
                    nonempty ^= 1 << room
                placed += [last] * left
                put([last], room - left * length)
                left = 0
        if left:
            each = capacity // length
            whole, rest = divmod(left, each)
            if whole:
                filled = list(range(opened, opened + whole))
                placed += filled * each
                put(filled, capacity - each * length)
            if rest:
                placed += [opened + whole] * rest
                put([opened + whole], capacity - rest * length)
            opened += whole + bool(rest)
    return placed
