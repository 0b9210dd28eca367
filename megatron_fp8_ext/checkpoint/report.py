"""What a conversion tells its user: progress on the way, a report at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Report:
    """A finished conversion.

    Attributes:
        path: the output.
        tensors: tensors written.
        nbytes: bytes of tensors read.
        seconds: time from the first read to the rename.
        notes: what the user should know, one line each.
    """

    path: Path
    tensors: int
    nbytes: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def gigabytes_per_second(self) -> float:
        """Throughput, of bytes read."""
        return self.nbytes / 1e9 / max(self.seconds, 1e-9)


@dataclass
class Meter:
    """Counts bytes read and tells a progress bar.

    Attributes:
        total: bytes that will be read.
        advance: called with the bytes of each step; None for no bar.
        start: called once with `total`.
    """

    total: int
    advance: Callable[[int], None] | None = None
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    def add(self, nbytes: int) -> None:
        """Count bytes just read."""
        self.done += nbytes
        if self.advance is not None:
            self.advance(nbytes)

    @property
    def seconds(self) -> float:
        """Time since the meter was made."""
        return time.monotonic() - self.began


# Called with the total number of bytes, returns what to call with each step's bytes.
Progress = Callable[[int], Callable[[int], None]]


def meter(total: int, progress: Progress | None) -> Meter:
    """Start counting."""
    return Meter(total, progress(total) if progress is not None else None)
