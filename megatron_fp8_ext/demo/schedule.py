"""One stable run and three decay branches of it, all of the same length, on the demo's text."""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_fp8_ext import picture, training_log
from megatron_fp8_ext.demo import run
from megatron_fp8_ext.demo.follow import follow
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.training_log import Iteration

PARTS = (20, 10, 5)  # per cent of the run that decay
WINDOW = 8  # iterations that a drawn loss is the mean of
VALIDATION = "--eval-iters 40 --eval-interval 1000000".split()


@dataclass(frozen=True)
class Line:
    """One run of the picture: its name, its iterations, its validation loss at the end."""

    name: str
    iterations: list[Iteration]
    validation: float

    @property
    def final_loss(self) -> float:
        """Mean training loss of the last ten iterations."""
        return statistics.fmean(i.loss for i in self.iterations[-10:] if i.loss is not None)


def main(output: Path, iterations: int) -> None:
    """Run the demo; everything it writes is under `output`.

    Raises:
        UserError: a length that cannot be divided, a missing package, or a failed run.
    """
    if iterations < 100 or iterations % 20:
        raise UserError(f"--iterations {iterations}: give a multiple of 20, from 100 on")
    picture.require("demo schedule")  # before training: a missing package should cost nothing
    console = Console()
    data = run.corpus(output / "corpus" / "text", console)
    starts = [iterations - iterations * part // 100 for part in PARTS]
    stable = _stable(output, data, iterations, starts, console)
    lines = [stable]
    for part, start in zip(PARTS, starts, strict=True):
        lines.append(_branch(output, data, start, part, iterations, console))
    _table(lines, starts, iterations, console)
    drawn = output / "schedule.svg"
    draw(drawn, lines)
    console.print(f"picture: {drawn}", soft_wrap=True)


def _command(data: Path, save: Path, *flags: str) -> list[str]:
    """What a user types."""
    training = list(run.TRAINING)
    for flag in ("--eval-iters", "--eval-interval"):
        at = training.index(flag)
        del training[at : at + 2]
    where = ["--data-path", str(data), "--data-cache-path", str(data.parent / "cache")]
    interval = ["--save", str(save), "--save-interval", "1000000"]
    return [
        sys.executable, "-m", run.ENTRY, *run.MODEL, *training, *VALIDATION, *where, *interval, *flags,
    ]  # fmt: skip


def _stable(
    output: Path, data: Path, iterations: int, starts: Sequence[int], console: Console
) -> Line:
    """Train the stable run; it stops and continues at each branch point, to save only there."""
    save = output / "stable"
    shutil.rmtree(save, ignore_errors=True)
    found: list[Iteration] = []
    begin = 0
    for end in (*starts, iterations):
        flags = (
            f"--lr-schedule wsd --wsd-warmup-fraction 0.1 --train-iters {iterations} --load {save}"
        ).split()
        if end != iterations:  # Megatron would leave before its last validation
            flags += ["--exit-interval", str(end)]
        log = output / f"stable-{end}.log"
        part = follow("stable", _command(data, save, *flags), log, (begin, end), console)
        found += training_log.own_losses(part)
        begin = end
    return Line("stable, no decay", found, _validation(log, iterations))


def _branch(
    output: Path, data: Path, start: int, part: int, iterations: int, console: Console
) -> Line:
    save, log = output / f"decay-{part}", output / f"decay-{part}.log"
    shutil.rmtree(save, ignore_errors=True)
    checkpoint = output / "stable" / f"iter_{start:07d}"
    flags = f"--wsd-decay-from {checkpoint} --wsd-decay-fraction {part / 100}".split()
    found = follow(f"{part} %", _command(data, save, *flags), log, (start, iterations), console)
    losses = training_log.own_losses(found)
    return Line(f"decay over {part} %", losses, _validation(log, iterations))


def _validation(log: Path, iteration: int) -> float:
    losses = training_log.validation_losses(log.read_text(errors="replace").splitlines())
    if iteration not in losses:
        raise UserError(f"{log} holds no validation loss at iteration {iteration}")
    return losses[iteration]


def _table(lines: Sequence[Line], starts: Sequence[int], iterations: int, console: Console) -> None:
    table = Table("run", "decay", "final rate", "training loss", "validation loss", box=None)
    for line, start in zip(lines, (iterations, *starts), strict=True):
        table.add_row(
            line.name,
            "-" if start == iterations else f"{start} to {iterations}",
            f"{line.iterations[-1].learning_rate:.2e}",
            f"{line.final_loss:.4f}",
            f"{line.validation:.4f}",
        )
    console.print(table)
    console.print("training loss: mean of the last 10 iterations; validation: 160 sequences of 256")


def draw(path: Path, lines: Sequence[Line]) -> None:
    """Draw learning rates, training losses, and what each branch gains on the stable run's samples."""
    figure, (rate, loss, gain) = picture.panels(8, 7, (1, 1, 1.2))
    stable, *branches = lines
    last = stable.iterations[-1].number
    base = {i.number: i for i in stable.iterations}
    for index, line in enumerate(lines):
        style = {"color": picture.COLOURS[index], "linewidth": 2.0 if index == 0 else 1.4}
        # From the point where it leaves the stable run, so that the curves meet.
        point = [i for i in (base.get(line.iterations[0].number - 1),) if i is not None]
        iterations = [*point, *line.iterations]
        x = [i.number for i in iterations]
        rate.plot(x, [i.learning_rate for i in iterations], label=line.name, **style)
        smooth = _smooth([*_losses(stable, until=x[0]), *_losses(line, since=x[0])])
        loss.plot(x, [smooth[n] for n in x], **style)
        if line in branches:
            paired = {n: value - base[n].loss for n, value in _losses(line)}  # type: ignore[operator]
            gains = [0.0] * bool(point) + list(_smooth(paired.items()).values())
            gain.plot(x, gains, **style)
    after = [value for n, value in _smooth(_losses(stable)).items() if n > last // 10]
    loss.set_ylim(min(after) - 0.2, max(after))
    loss.set_xlim(0, last)
    loss.set_ylabel("LM loss")
    gain.axhline(0, color=picture.COLOURS[0], linewidth=2.0)
    gain.set_xlim(branches[0].iterations[0].number - last // 20, last)
    gain.set_ylabel("LM loss less the stable run's")
    gain.set_xlabel(f"iteration (losses: mean of {WINDOW})")
    picture.learning_rates(figure, rate)
    rate.set_xlim(0, last)
    picture.write_svg(path, figure)


def _losses(line: Line, since: int = 0, until: int | None = None) -> list[tuple[int, float]]:
    """(iteration, loss) of a run after iteration `since`, and up to `until`."""
    return [
        (i.number, i.loss)
        for i in line.iterations
        if i.loss is not None and i.number > since and (until is None or i.number <= until)
    ]


def _smooth(losses: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Mean of the last WINDOW losses, by iteration."""
    numbers, values = zip(*losses, strict=True)
    return {
        number: statistics.fmean(values[max(i - WINDOW + 1, 0) : i + 1])
        for i, number in enumerate(numbers)
    }
