"""Run a training command in sight: a progress bar, its log, its iterations."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_fp8_ext import training_log
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.training_log import Iteration


def follow(
    name: str, argv: Sequence[str], log: Path, span: tuple[int, int], console: Console
) -> list[Iteration]:
    """Run a training command, show its progress, and return its iterations.

    Args:
        name: what the progress bar calls it.
        argv: the command.
        log: where its output goes.
        span: iteration it continues from, and its last one.
        console: where the bar is drawn.

    Raises:
        UserError: it stopped early; its last words and its log are named.
    """
    found: list[Iteration] = []
    columns = (
        TextColumn("{task.description:>6}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[note]}"),
        TimeRemainingColumn(),
    )
    first, last = span
    with Progress(*columns, console=console) as bar, log.open("w") as file:
        task = bar.add_task(name, total=last - first, note="starting")
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        file.write(f"$ {' '.join(argv)}\n")
        for line in process.stdout:
            file.write(line)
            if line.startswith("megatron_fp8_ext: no GPU"):
                bar.console.print(line.strip(), soft_wrap=True)
            iteration = training_log.parse_line(line)
            if iteration is not None:
                found.append(iteration)
                shown = "skipped" if iteration.loss is None else f"loss {iteration.loss:.3f}"
                bar.update(task, completed=iteration.number - first, note=shown)
        code = process.wait()
    if code != 0 or len(found) != last - first:
        raise UserError(
            f"the {name} run stopped with exit code {code} after {len(found)} of {last - first} "
            f"iterations: {_last_words(log)}; the whole log is {log}"
        )
    return found


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error:" in line]
    return (errors or lines or ["no output"])[-1]
