"""Is the loss the same? A paired comparison, its confidence interval, and a rule fixed beforehand.

The gap of a seed is `(L - L_bf16) / L_bf16`, L the mean training loss over the last fifth of the steps. Both
runs of a pair start from the same weights and read the same batches in the same order, so that the noise of
the data is in both and falls out. Over the seeds it has a mean and a two-sided 95 % interval of Student's t.

    lossless        the interval's upper end is below 0.25 % (DeepSeek-V3's bar, arXiv 2412.19437)
    not lossless    its lower end is above 0.25 %, or a run diverged
    inconclusive    anything else
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MARGIN = 0.0025
CONFIDENCE = 0.95
# The verdict's own window; below that many steps no run is called lossless, because at the start of
# training every precision looks alike.
WINDOW = 0.2
MINIMUM_STEPS = 200

Kind = Literal["baseline", "lossless", "not lossless", "inconclusive"]


@dataclass(frozen=True)
class Interval:
    """A mean and its two-sided interval at CONFIDENCE; infinite ends for a single value."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Verdict:
    """The rule's answer, and the reason in a clause."""

    kind: Kind
    why: str


def window(steps: int) -> range:
    """Iterations whose loss counts: the last fifth."""
    return range(steps - max(int(steps * WINDOW), 1) + 1, steps + 1)


def t_cdf(t: float, freedom: int) -> float:
    """Student's t distribution function for whole degrees of freedom, in closed form.

    Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    theta = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(theta), math.sin(theta)
    total = 0.0
    if freedom % 2:
        term = cosine
        for k in range(3, freedom + 1, 2):
            total += term
            term *= cosine * cosine * (k - 1) / k
        area = 2 / math.pi * (theta + sine * total)
    else:
        term = 1.0
        for k in range(2, freedom + 1, 2):
            total += term
            term *= cosine * cosine * (k - 1) / k
        area = sine * total
    return 0.5 + area / 2


def t_quantile(p: float, freedom: int) -> float:
    """Return t with `t_cdf(t) = p`, for p in (0.5, 1)."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values with its t-interval.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("no value")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * error
    return Interval(mean, mean - half, mean + half, len(values))


def judge(
    gap: Interval | None,
    *,
    steps: int,
    planned: int,
    diverged: int,
    gemms: int,
    trained_alike: bool = True,
) -> Verdict:
    """Apply the rule to one recipe.

    Args:
        gap: of its finished pairs; None without any.
        steps: of each run.
        planned: pairs there should be.
        diverged: runs whose loss went missing or infinite where BF16's did not.
        gemms: quantized GEMMs that were counted; a run that cast nothing proves nothing.
        trained_alike: whether every run of it finished.
    """
    if diverged:
        return Verdict("not lossless", f"{diverged} of {planned} runs diverged")
    if gap is None:
        return Verdict("inconclusive", "no finished pair of runs")
    if gap.count < 2:
        return Verdict("inconclusive", "one seed has no interval; use --seeds 2 or more")
    if gap.low > MARGIN:
        return Verdict("not lossless", f"the whole interval is above {MARGIN:.2%}")
    if gemms == 0:
        return Verdict("inconclusive", "no quantized GEMM was counted")
    if not trained_alike:
        return Verdict("inconclusive", f"only {gap.count} of {planned} pairs finished")
    if gap.high >= MARGIN:
        return Verdict("inconclusive", f"the interval reaches {gap.high:+.2%}, over {MARGIN:.2%}")
    if steps < MINIMUM_STEPS:
        return Verdict("inconclusive", f"{steps} steps are fewer than {MINIMUM_STEPS}")
    return Verdict("lossless", f"the upper end of the interval is below {MARGIN:.2%}")
