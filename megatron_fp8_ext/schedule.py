"""WSD (warmup, stable, decay) as a pure function of samples, identical to Megatron's.

Megatron counts in samples: one iteration is `global_batch_size` of them. Tests hold this file to
`megatron.core.optimizer_param_scheduler.OptimizerParamScheduler`, step for step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from megatron_fp8_ext.errors import UserError

DecayStyle = Literal["cosine", "linear", "exponential", "minus_sqrt"]
STYLES: tuple[DecayStyle, ...] = ("cosine", "linear", "exponential", "minus_sqrt")
# What a phase may be measured in, and what Megatron counts a run in.
Unit = Literal["iters", "samples", "tokens", "fraction"]
UNITS: tuple[Unit, ...] = ("iters", "samples", "tokens", "fraction")
Base = Literal["iters", "samples"]


@dataclass(frozen=True, kw_only=True)
class WSD:
    """Warmup to `lr`, hold it, decay to `min_lr` over the last `decay_samples`.

    A package may register a subclass with other defaults under `megatron_fp8_ext.lr_schedules`;
    `--lr-schedule NAME` then expands through it.

    Attributes:
        default_decay: part of the run that decays where the command names no decay length; 0 leaves
            the decay to a branch.
        lr: the stable learning rate.
        min_lr: learning rate at the end and after it.
        warmup_samples: length of the linear warmup.
        total_samples: end of the decay.
        decay_samples: length of the decay.
        decay_style: as Megatron's `--lr-wsd-decay-style`.
        init_lr: learning rate at sample 0.
    """

    default_decay: ClassVar[float] = 0.0

    lr: float
    min_lr: float
    warmup_samples: int
    total_samples: int
    decay_samples: int
    decay_style: DecayStyle = "cosine"
    init_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.decay_samples > self.total_samples - self.warmup_samples:
            raise UserError(
                f"the decay of {self.decay_samples} samples begins inside the warmup of "
                f"{self.warmup_samples} (of {self.total_samples} in all): shorten one of the two"
            )

    @property
    def decay_start(self) -> int:
        """First sample of the decay."""
        return self.total_samples - self.decay_samples

    def at(self, samples: int) -> float:
        """Return the learning rate after `samples` consumed samples."""
        if self.warmup_samples > 0 and samples <= self.warmup_samples:
            return self.init_lr + (self.lr - self.init_lr) * samples / self.warmup_samples
        if samples > self.total_samples:
            return self.min_lr
        coefficient = 1.0
        if samples > self.decay_start:
            ratio = (samples - self.decay_start) / self.decay_samples
            coefficient = _COEFFICIENT[self.decay_style](ratio)
        # Also in the stable phase, as Megatron: the sum may differ from lr in its last bit.
        return self.min_lr + coefficient * (self.lr - self.min_lr)


_COEFFICIENT: dict[DecayStyle, Callable[[float], float]] = {
    "linear": lambda r: 1.0 - r,
    "cosine": lambda r: 0.5 * (math.cos(math.pi * r) + 1.0),
    "exponential": lambda r: 2.0 * 0.5**r - 1.0,
    "minus_sqrt": lambda r: 1.0 - math.sqrt(r),
}


@dataclass(frozen=True)
class Length:
    """The length of a phase as it was written: a number, its unit, and the flag, for messages."""

    value: Fraction
    unit: Unit
    flag: str

    def __str__(self) -> str:
        return f"{self.flag} {_number(self.value)}"


@dataclass(frozen=True)
class Batch:
    """What turns one unit into another; None where the command does not say.

    Attributes:
        samples: samples of an iteration, `--global-batch-size`.
        tokens: tokens of a sample, `--seq-length`.
    """

    samples: int | None = None
    tokens: int | None = None

    def length_in(self, length: Length, base: Base) -> int:
        """Return `length` in whole `base` units; a last, partial one counts as one.

        Raises:
            UserError: the flag that the conversion needs is missing.
        """
        value = length.value
        if length.unit == base:
            return math.ceil(value)
        if length.unit == "tokens":
            value /= self._need(self.tokens, "--seq-length", length)
            if base == "iters":
                value /= self._need(self.samples, "--global-batch-size", length)
        elif base == "iters":
            value /= self._need(self.samples, "--global-batch-size", length)
        else:
            value *= self._need(self.samples, "--global-batch-size", length)
        return math.ceil(value)

    @staticmethod
    def _need(size: int | None, flag: str, length: Length) -> int:
        if size is None:
            raise UserError(f"{length} needs {flag} to be counted with: add {flag}")
        return size


@dataclass(frozen=True, kw_only=True)
class Phases:
    """The three lengths of a run, all in `base` units."""

    warmup: int
    stable: int
    decay: int
    base: Base

    @property
    def total(self) -> int:
        """Length of the run."""
        return self.warmup + self.stable + self.decay


def resolve(
    warmup: Length | None,
    stable: Length | None,
    decay: Length | None,
    total: Length | None,
    base: Base,
    batch: Batch,
    default_decay: float = 0.0,
) -> Phases:
    """Return the lengths of all phases from those that were written.

    Fractions are of the whole run. One of `stable` and `total` may be left out. A missing decay is
    what `stable` leaves of `total`, else `default_decay` of the run; a missing warmup is none.

    Raises:
        UserError: too little or contradictory information, naming the flags.
    """
    if decay is None and not (stable and total) and default_decay:
        decay = Length(Fraction(str(default_decay)), "fraction", "the schedule's own decay of")
    written = [length for length in (warmup, stable, decay) if length is not None]
    whole = None if total is None else batch.length_in(total, base)
    if whole is None:
        if stable is None:
            raise UserError(
                "the length of the run is not known: add --train-iters (or --train-samples), or the "
                "length of the stable phase, such as --wsd-stable-iters"
            )
        whole = _whole(written, base, batch)
    if whole < 1:
        raise UserError(f"{total or stable} makes a run of no iteration: give a longer one")

    def measure(length: Length | None) -> int | None:
        if length is None:
            return None
        if length.unit == "fraction":
            return round(length.value * whole)
        return batch.length_in(length, base)

    a, b, c = measure(warmup) or 0, measure(stable), measure(decay)
    by_fraction = any(length.unit == "fraction" for length in written)
    if b is None or (total is None and stable is not None and stable.unit == "fraction"):
        b = whole - a - (c or 0)
    elif total is not None and c is None:
        c = whole - a - b
    elif total is not None and a + b + (c or 0) != whole:
        if not by_fraction or abs(a + b + (c or 0) - whole) > 2:
            parts = ", ".join(str(length) for length in written)
            raise UserError(
                f"{total} contradicts {parts}, which make {a + b + (c or 0)} {base}: drop one of them"
            )
        b = whole - a - (c or 0)  # rounding of the fractions ends in the stable phase
    c = c or 0
    if min(b, c) < 0:
        parts = ", ".join(str(length) for length in written)
        raise UserError(
            f"{parts}: longer than the whole run of {whole} {base}; shorten a phase or lengthen the run"
        )
    return Phases(warmup=a, stable=b, decay=c, base=base)


def _whole(written: Sequence[Length], base: Base, batch: Batch) -> int:
    """Return the run's length that leaves the written fractions to the written lengths."""
    fractions = sum((x.value for x in written if x.unit == "fraction"), Fraction(0))
    fixed = sum(batch.length_in(x, base) for x in written if x.unit != "fraction")
    if fractions and (fractions >= 1 or not fixed):
        parts = ", ".join(str(length) for length in written)
        raise UserError(f"{parts}: fractions alone give no length; add --train-iters")
    return math.ceil(Fraction(fixed) / (1 - fractions))


def _number(value: Fraction) -> str:
    return str(int(value)) if value.denominator == 1 else f"{float(value):g}"
