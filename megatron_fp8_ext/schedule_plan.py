"""A stable run and its branches on paper: phases, learning rate at each boundary, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fp8_ext import picture
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.schedule import WSD, Base, Batch, DecayStyle


@dataclass(frozen=True)
class Curve:
    """A part of a schedule.

    Attributes:
        name: for the legend.
        schedule: the learning rate.
        begin: where the part begins.
        end: where it ends.
        jump_from: learning rate of the run it leaves, where its own begins at another.
    """

    name: str
    schedule: WSD
    begin: int
    end: int
    jump_from: float | None = None


@dataclass(frozen=True)
class Row:
    """One phase: name, boundaries, and the learning rate at both."""

    phase: str
    begin: int
    end: int
    lr_begin: float
    lr_end: float


@dataclass(frozen=True)
class Scale:
    """What the schedules count in, and what turns it into the other units."""

    base: Base
    batch: Batch

    def iterations(self, count: int) -> float | None:
        """Return a position in iterations; None where the command does not say enough."""
        if self.base == "iters":
            return count
        return None if self.batch.samples is None else count / self.batch.samples

    def samples(self, count: int) -> int | None:
        """Return a position in samples."""
        if self.base == "samples":
            return count
        return None if self.batch.samples is None else count * self.batch.samples

    def tokens(self, count: int) -> int | None:
        """Return a position in tokens."""
        samples = self.samples(count)
        return None if samples is None or not self.batch.tokens else samples * self.batch.tokens


def rows(curve: Curve) -> list[Row]:
    """Return the phases of a curve that have a length."""
    wsd = curve.schedule
    bounds = (
        ("warmup", 0, wsd.warmup_samples),
        ("stable", wsd.warmup_samples, wsd.decay_start),
        (f"{wsd.decay_style} decay", wsd.decay_start, wsd.total_samples),
    )
    out = []
    if curve.jump_from is not None:
        out.append(Row("JUMP", curve.begin, curve.begin, curve.jump_from, wsd.at(curve.begin)))
    for phase, begin, end in bounds:
        begin, end = max(begin, curve.begin), min(end, curve.end)
        if begin < end:
            out.append(Row(phase, begin, end, wsd.at(begin), wsd.at(end)))
    return out


def branch(
    stable: WSD, at: int, length: int, style: DecayStyle | None = None, size: int = 1
) -> WSD:
    """Return the schedule of a decay of `length` iterations that leaves `stable` at iteration `at`.

    Args:
        stable: the run it leaves.
        at: its last iteration before the decay.
        length: of the decay.
        style: of the decay; the stable run's if None.
        size: of an iteration, in the units of `stable`.

    Raises:
        UserError: `at` lies inside the warmup or the decay, or outside of the run.
    """
    here = at * size
    first, last = max(-(-stable.warmup_samples // size), 1), stable.decay_start // size
    decays = stable.decay_samples > 0 and here < stable.total_samples
    for wrong, reason, mend in (
        (at < 1, "has no checkpoint", f"at {first} or later"),
        (here < stable.warmup_samples, "is inside the warmup", f"at {first} or later"),
        (
            here > stable.decay_start,
            "is inside the decay" if decays else "is after the end of the run",
            f"at {last} or earlier",
        ),
    ):
        if wrong:
            raise UserError(f"a branch at iteration {at} {reason}: branch {mend}")
    return WSD(
        lr=stable.lr,
        min_lr=stable.min_lr,
        warmup_samples=stable.warmup_samples,
        total_samples=here + length * size,
        decay_samples=length * size,
        decay_style=style or stable.decay_style,
        init_lr=stable.init_lr,
    )


def draw(curves: Sequence[Curve], scale: Scale, width: int = 72, height: int = 13) -> list[str]:
    """Return the curves as lines of text; each is drawn with its number, the first with a star.

    Args:
        curves: what to draw.
        scale: what they count in.
        width: columns of the plot.
        height: its lines; a multiple of 3 and one, so that the first and the last are labelled.
    """
    last = max(curve.end for curve in curves)
    top = max(_peak(curve) for curve in curves) or 1.0
    grid = [[" "] * width for _ in range(height)]
    for index, curve in enumerate(curves):
        mark = "*" if index == 0 else str(index % 10)
        before: int | None = None
        for column in range(width):
            here = round(last * column / (width - 1))
            if curve.begin <= here <= curve.end:
                line = round((1 - curve.schedule.at(here) / top) * (height - 1))
                grid[line][column] = mark
                # A steep part is drawn without gaps.
                for between in range(min(line, before or line), max(line, before or line)):
                    if grid[between][column] == " ":
                        grid[between][column] = mark
                before = line
    out = []
    for number, cells in enumerate(grid):
        label = f"{top * (1 - number / (height - 1)):.2e}" if number % 3 == 0 else ""
        out.append(f"{label:>9} |{''.join(cells).rstrip()}")
    shown = scale.iterations(last)
    end = f"{last} samples" if shown is None else f"{shown:g} iterations"
    return [*out, f"{'':>9} +{'-' * width}", f"{'':>11}0{end:>{width - 1}}"]


def _peak(curve: Curve) -> float:
    points = (curve.begin, curve.schedule.warmup_samples, curve.end)
    return max(curve.schedule.at(p) for p in points if curve.begin <= p <= curve.end)


def write_svg(path: Path, curves: Sequence[Curve], scale: Scale) -> None:
    """Draw the curves into an SVG file.

    Raises:
        UserError: no matplotlib, or a place that cannot be written.
    """
    picture.require(f"--svg {path}")
    figure, (axes,) = picture.panels(8, 3.4)
    for index, curve in enumerate(curves):
        count = min(curve.end - curve.begin, 400)
        where = [
            curve.begin + round(i * (curve.end - curve.begin) / count) for i in range(count + 1)
        ]
        # The boundary points exactly, so that corners are corners.
        where += [row.begin for row in rows(curve)]
        where = sorted(set(where))
        axes.plot(
            [scale.iterations(x) if scale.iterations(x) is not None else x for x in where],
            [curve.schedule.at(x) for x in where],
            label=curve.name,
            color=picture.COLOURS[index % len(picture.COLOURS)],
            linewidth=2.2 if index == 0 else 1.4,
        )
    axes.set_xlabel("samples" if scale.iterations(1) is None else "iteration")
    picture.learning_rates(figure, axes)
    picture.write_svg(path, figure)
