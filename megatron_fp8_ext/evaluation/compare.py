"""Two evaluations of the same prompts: the paired difference of their scores and its interval."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.evaluation.results import standard_error

# What must agree for the difference to be one between the models.
_SAME = ("samples", "max_tokens", "temperature", "top_p", "system_prompt")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """B minus A on one benchmark, in percentage points.

    Attributes:
        benchmark: its name.
        questions: that both answered.
        a, b: the two averages in percent.
        difference: b - a, the mean over questions.
        low, high: confidence interval of the mean (Student's t over the paired questions).
        level: of the interval, such as 0.95.
        better, worse, equal: questions on which B's share is above, below, the same as A's.
    """

    benchmark: str
    questions: int
    a: float
    b: float
    difference: float
    low: float
    high: float
    level: float
    better: int
    worse: int
    equal: int

    @property
    def says(self) -> str:
        """The interval in words."""
        if math.isnan(self.low):
            return "one question has no interval"
        if self.low == self.high == 0:
            return "the same on every question"
        if self.low <= 0 <= self.high:
            width = (self.high - self.low) / 2
            return f"no difference seen; one below {width:.1f} points could not be"
        return "B is better" if self.low > 0 else "B is worse"


def load(place: Path) -> dict[str, Any]:
    """Return the results that an evaluation wrote.

    Raises:
        UserError: no readable results there.
    """
    file = place / "results.json" if place.is_dir() else place
    try:
        found = json.loads(file.read_text())
        found["benchmarks"].items()
    except FileNotFoundError:
        raise UserError(f"{place}: no results.json there; run megatron-fp8 eval first") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not the results of megatron-fp8 eval: {error!r}") from error
    return dict(found)


def compare(a: dict[str, Any], b: dict[str, Any], level: float = 0.95) -> list[Difference]:
    """Return the paired differences on the benchmarks that both have.

    Raises:
        UserError: none in common, or other prompts or settings.
    """
    if not 0 < level < 1:
        raise UserError(f"--level {level}: must lie between 0 and 1")
    names = [name for name in a["benchmarks"] if name in b["benchmarks"]]
    if not names:
        raise UserError(
            f"no benchmark in common: {', '.join(a['benchmarks'])} and {', '.join(b['benchmarks'])}"
        )
    found = []
    for name in names:
        ours, theirs = a["benchmarks"][name], b["benchmarks"][name]
        for key in _SAME:
            x, y = ours["settings"].get(key), theirs["settings"].get(key)
            if x != y:
                raise UserError(f"{name}: {key} is {x} in A and {y} in B: evaluate both alike")
        if ours["prompts"] != theirs["prompts"]:
            raise UserError(
                f"{name}: A and B did not answer the same prompts (other data, other order or another "
                "evalscope): evaluate both with the same --data and environment"
            )
        shares = [[right / part["samples"] for right in part["right"]] for part in (ours, theirs)]
        gaps = [100 * (y - x) for x, y in zip(*shares, strict=True)]
        mean = statistics.fmean(gaps)
        half = math.nan
        if len(gaps) > 1:
            half = t_quantile((1 + level) / 2, len(gaps) - 1) * standard_error(gaps)
        found.append(
            Difference(
                benchmark=name,
                questions=len(gaps),
                a=100 * statistics.fmean(shares[0]),
                b=100 * statistics.fmean(shares[1]),
                difference=mean,
                low=mean - half,
                high=mean + half,
                level=level,
                better=sum(gap > 0 for gap in gaps),
                worse=sum(gap < 0 for gap in gaps),
                equal=sum(gap == 0 for gap in gaps),
            )
        )
    return found


def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t for a probability above one half.

    With x = sqrt(n) tan(u) the density becomes c cos(u)^(n-1), smooth on a finite range, which
    Simpson's rule integrates; the quantile is found by bisection.
    """
    n = degrees
    c = math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2)) / math.sqrt(math.pi)

    def above_half(angle: float, steps: int = 400) -> float:
        h = angle / steps
        inner = sum((4 if i % 2 else 2) * math.cos(i * h) ** (n - 1) for i in range(1, steps))
        return c * h / 3 * (1 + inner + math.cos(angle) ** (n - 1))

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above_half(middle) < probability - 0.5 else (low, middle)
    return math.sqrt(n) * math.tan(low)
