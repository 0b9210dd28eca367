"""What a run has logged so far, whichever kind of file it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Reading(NamedTuple):
    """A logged number, and when it was written (seconds since 1970; None where the file does not say)."""

    value: float
    time: float | None


@dataclass
class Readings:
    """The numbers and the arguments of one run, in the order they were logged.

    Attributes:
        source: folder of event files, or a log.
        series: by TensorBoard tag, then by step. After a resume from an earlier checkpoint the steps that
            are computed again replace the old ones.
        arguments: Megatron's arguments by name with underscores, as text.
        attempt: step at which the last start began to log, by tag.
        updated: when the source was written last, seconds since 1970; None before the first number.
    """

    source: Path
    series: dict[str, dict[int, Reading]] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    attempt: dict[str, int] = field(default_factory=dict)
    updated: float | None = None

    def add(self, tag: str, step: int, value: float, time: float | None, new_start: bool) -> None:
        """Append one number.

        Args:
            tag: its name.
            step: iteration that it belongs to.
            value: the number.
            time: when it was written.
            new_start: whether it is the first of its tag after a start of the run.
        """
        series = self.series.setdefault(tag, {})
        if series and step <= next(reversed(series)):
            for stale in [each for each in series if each >= step]:
                del series[stale]
        if new_start or tag not in self.attempt:
            self.attempt[tag] = step
        series[step] = Reading(value, time)

    def get(self, *tags: str) -> dict[int, Reading]:
        """Return the series of the first tag that has one."""
        return next((self.series[tag] for tag in tags if self.series.get(tag)), {})
