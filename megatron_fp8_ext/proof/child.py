"""Follow a training command while it runs: its log, a progress bar, its iterations, its last words."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from megatron_fp8_ext import training_log
from megatron_fp8_ext.training_log import Iteration


def progress(console: Console) -> Progress:
    """Return the bars of runs; a task has a field `note`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[note]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


def follow(
    process: subprocess.Popen[str], log: TextIO, bar: Progress, task: TaskID, first: int = 0
) -> Iterator[Iteration]:
    """Copy what a process prints into its log, line by line, and yield the iterations it logs.

    Args:
        process: started with `stdout=PIPE`.
        log: open file; it is flushed after each line, so that a reader sees all of it.
        bar: shows the iteration and its loss.
        task: of `bar`.
        first: iteration that the bar begins at.
    """
    assert process.stdout is not None
    for line in process.stdout:
        log.write(line)
        log.flush()
        iteration = training_log.parse_line(line)
        if iteration is not None:
            shown = "skipped" if iteration.loss is None else f"loss {iteration.loss:.3f}"
            bar.update(task, completed=iteration.number - first, note=shown)
            yield iteration


def last_words(text: str) -> str:
    """Return the line that most likely says why a run ended; empty where it printed nothing."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error:" in line]
    return (errors or lines or [""])[-1]
