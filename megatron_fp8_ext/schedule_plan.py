"""A stable run and its branches on paper: phases, learning rate at each boundary, and a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.schedule import WSD, Base, Batch, DecayStyle

# Read as well by colour-blind readers, and on white and on black.
COLOURS = ("#888888", "#d1495b", "#2e86ab", "#66a182", "#edae49", "#8d5a97")


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
    stable: WSD,
    at: int,
    length: int,
    style: DecayStyle | None = None,
    lr: float | None = None,
    min_lr: float | None = None,
) -> WSD:
    """Return the schedule of a decay of `length` that leaves `stable` at `at`, in the same units.

    Raises:
        UserError: `at` lies inside the warmup or the decay.
    """
    for inside, phase, mend in (
        (at < stable.warmup_samples, "warmup", f"at {stable.warmup_samples} or later"),
        (at > stable.decay_start, "decay", f"at {stable.decay_start} or earlier"),
    ):
        if inside:
            raise UserError(f"a branch at {at} is inside the {phase}: branch {mend}")
    return WSD(
        lr=stable.lr if lr is None else lr,
        min_lr=stable.min_lr if min_lr is None else min_lr,
        warmup_samples=stable.warmup_samples,
        total_samples=at + length,
        decay_samples=length,
        decay_style=style or stable.decay_style,
        init_lr=stable.init_lr,
    )


def draw(curves: Sequence[Curve], scale: Scale, width: int = 72, height: int = 12) -> list[str]:
    """Return the curves as lines of text; each is drawn with its number, the first with a star."""
    last = max(curve.end for curve in curves)
    top = max(_peak(curve) for curve in curves) or 1.0
    grid = [[" "] * width for _ in range(height)]
    for index, curve in enumerate(curves):
        mark = "*" if index == 0 else str(index % 10)
        for column in range(width):
            here = round(last * column / (width - 1))
            if curve.begin <= here <= curve.end:
                line = round((1 - curve.schedule.at(here) / top) * (height - 1))
                grid[line][column] = mark
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
    """Draw the curves into an SVG file, by a temporary name and a rename.

    Raises:
        UserError: no matplotlib, or a folder that cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("svg")
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            f'--svg {path} needs matplotlib ({error}): pip install "megatron-fp8-ext[report]"'
        ) from error
    figure = Figure(figsize=(8, 3.4), layout="tight")
    axes = figure.subplots()
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
            color=COLOURS[index % len(COLOURS)],
            linewidth=2.2 if index == 0 else 1.4,
        )
    axes.set_xlabel("samples" if scale.iterations(1) is None else "iteration")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "schedule"}):
            with partial.open("wb") as file:
                figure.savefig(file, format="svg", metadata={"Date": None})
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"--svg {path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
