"""One stable run and three decay branches of it, all of the same length, on the demo's text."""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Sequence
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
        found += follow("stable", _command(data, save, *flags), log, (begin, end), console)
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
    return Line(f"decay over {part} %", found, _validation(log, iterations))


def _validation(log: Path, iteration: int) -> float:
    losses = training_log.validation_losses(log.read_text(errors="replace").splitlines())
    if iteration not in losses:
        raise UserError(f"{log} holds no validation loss at iteration {iteration}")
    return losses[iteration]


def _table(lines: Sequence[Line], starts: Sequence[int], iterations: int, console: Console) -> None:
    table = Table(
        "run", "decay", "last learning rate", "training loss", "validation loss", box=None
    )
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
    """Draw learning rates and training losses."""
    figure, (rate, loss) = picture.panels(8, 5.2, (1, 1.6))
    for index, line in enumerate(lines):
        style = {"color": picture.COLOURS[index], "linewidth": 2.0 if index == 0 else 1.4}
        x = [i.number for i in line.iterations]
        rate.plot(x, [i.learning_rate for i in line.iterations], label=line.name, **style)
        smooth = _smooth([i.loss for i in (*_before(lines[0], x[0]), *line.iterations)])
        loss.plot(x, smooth[-len(x) :], **style)
    last = lines[0].iterations[-1].number
    loss.set_xlim(0, last)
    half = [i.loss for line in lines for i in line.iterations if i.loss and i.number > last // 4]
    loss.set_ylim(min(half) - 0.1, max(half) + 0.1)
    loss.set_ylabel("LM loss, mean of 8")
    loss.set_xlabel("iteration")
    picture.learning_rates(figure, rate)
    picture.write_svg(path, figure)


def _before(stable: Line, iteration: int) -> list[Iteration]:
    return [i for i in stable.iterations if i.number < iteration]


def _smooth(losses: Sequence[float | None], window: int = 8) -> list[float]:
    known = [loss for loss in losses if loss is not None]
    return [statistics.fmean(known[max(i - window + 1, 0) : i + 1]) for i in range(len(known))]
