"""`megatron-fp8 watch DIR`: a run's progress on one terminal screen."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.watch import find, screen
from megatron_fp8_ext.watch.status import Status, status


def watch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the run's output folder")],
    once: Annotated[bool, typer.Option("--once", help="print one screen and end")] = False,
    interval: Annotated[float, typer.Option(help="seconds between two looks")] = 2.0,
    peak_tflops: Annotated[
        float | None, typer.Option(help="dense BF16 peak of one GPU, for MFU; default: by its name")
    ] = None,
) -> None:
    """Loss, learning rate, tokens/s, MFU and time left, from event files or Megatron's log."""
    if interval <= 0:
        raise UserError(f"--interval {interval:g}: must be above 0 seconds")
    if peak_tflops is not None and peak_tflops <= 0:
        raise UserError(f"--peak-tflops {peak_tflops:g}: must be above 0")
    found, console = find.find(folder), Console()

    def look() -> Status:
        now = status(found.source.read(), peak_tflops)
        if now is None:
            raise UserError(
                f"{found.source.readings.source}: no iteration logged yet; try again after the first "
                "--log-interval"
            )
        return now

    now = look()
    if once:
        console.print(screen.frame(found, now, time.time()))
        return
    try:
        if console.is_terminal:
            _live(console, found, now, look, interval)
        else:
            _lines(now, look, interval)
    except KeyboardInterrupt:
        return


def _live(
    console: Console, found: find.Found, now: Status, look: Callable[[], Status], interval: float
) -> None:
    with Live(screen.frame(found, now, time.time()), console=console, auto_refresh=False) as live:
        while not now.finished:
            time.sleep(interval)
            now = look()
            live.update(screen.frame(found, now, time.time()), refresh=True)


def _lines(now: Status, look: Callable[[], Status], interval: float) -> None:
    print(screen.line(now), flush=True)
    while not now.finished:
        time.sleep(interval)
        before, now = now, look()
        if now.iteration != before.iteration:
            print(screen.line(now), flush=True)
