"""Which samples form each global batch: a seeded order of every epoch, as a pure function.

Position p of the endless stream of samples is entry p % n of epoch p // n's own permutation of the n samples.
A global batch is a slice of the stream, so it depends on the seed and on the number of samples consumed
before it, and on nothing else: not on ranks, packing or where a run was stopped.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt


class EpochOrder:
    """The stream of sample indexes.

    Args:
        samples: number of samples of the data set.
        seed: of the order.
        shuffle: False keeps the order of the files in every epoch.
    """

    def __init__(self, samples: int, seed: int, shuffle: bool = True) -> None:
        self.samples, self.seed, self.shuffle = samples, seed, shuffle
        self._permutation = functools.lru_cache(maxsize=2)(self._make)

    def _make(self, epoch: int) -> npt.NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self.samples)
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.samples)

    def take(self, consumed: int, count: int) -> npt.NDArray[np.int64]:
        """Return the `count` samples that follow the first `consumed` of the stream, `[count]`."""
        parts = []
        while count:
            epoch, at = divmod(consumed, self.samples)
            part = self._permutation(epoch)[at : at + count]
            parts.append(part)
            consumed, count = consumed + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)
