"""The figures of a run as one screen of 80 columns, or as one line of text."""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Mapping

from rich.console import Group
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_fp8_ext.watch.find import Found
from megatron_fp8_ext.watch.status import Status

_BARS = "▁▂▃▄▅▆▇█"
_CURVE = 60  # columns
_SILENT = 120.0  # seconds without a word, and ten iterations, that are worth a warning


def frame(found: Found, now: Status, clock: float) -> Panel:
    """Return the screen.

    Args:
        found: the run.
        now: its figures.
        clock: current time, seconds since 1970.
    """
    total = now.total
    share = f"{now.iteration / total:.0%}" if total else ""
    head = Table.grid(padding=(0, 1), expand=True)
    head.add_column()
    head.add_column(ratio=1)
    head.add_column(justify="right")
    head.add_row(
        f"iteration {now.iteration:,}" + (f" of {total:,}" if total else ""),
        ProgressBar(total=total or 1, completed=min(now.iteration, total or 0)),
        share,
    )
    body = Table.grid(padding=(0, 2))
    for row in _rows(now):
        body.add_row(*row)
    curves = Table.grid(padding=(0, 1))
    for name, series in (("loss", now.losses), ("lr", now.learning_rates)):
        if len(series) > 1:
            curves.add_row(name, curve(series))
    notes = [*now.notes, *_news(now, clock)]
    if found.others:
        shown = ", ".join(str(place) for place in found.others[:3])
        notes.append(f"newest of {len(found.others) + 1} runs; also here: {shown}")
    lines = [Text(note, style="dim") for note in notes]
    title = escape(found.name or str(found.source.readings.source))
    return Panel(
        Group(head, "", body, "", curves, *lines),
        title=title,
        subtitle=escape(str(found.source.readings.source)) if found.name else None,
    )


def _rows(now: Status) -> list[tuple[str, str, str, str]]:
    per_gpu = ""
    if now.tokens_per_second is not None and (now.world_size or 1) > 1:
        per_gpu = f" ({now.tokens_per_second / (now.world_size or 1):,.0f}/GPU)"
    tested = "-" if now.validation is None else f"{now.validation[1]:.4f} at {now.validation[0]:,}"
    rows = [
        ("loss", _number(now.loss, ".4f"), "tokens/s", _number(now.tokens_per_second, ",.0f") + per_gpu),
        ("learning rate", _number(now.learning_rate, ".3e"), "MFU", _number(now.mfu, ".1%")),
        ("gradient norm", _number(now.grad_norm, ".3f"), "TFLOP/s/GPU", _number(now.teraflops, ".4g")),
        ("validation", tested, "s/iteration", _number(now.seconds, ".3g")),
        ("tokens", _number(now.tokens, ",d"), "ETA", duration(now.eta)),
    ]  # fmt: skip
    if now.reward is not None:
        rows.append(("reward", f"{now.reward:.4f}", "", ""))
    rows.append(("recipe", now.recipe or "-", "GPUs", _gpus(now)))
    return rows


def _gpus(now: Status) -> str:
    if now.world_size is None:
        return now.device or "-"
    return f"{now.world_size} x {now.device}" if now.device else str(now.world_size)


def _news(now: Status, clock: float) -> list[str]:
    if now.finished:
        return ["finished"]
    if now.updated is None:
        return []
    age = clock - now.updated
    if age > max(_SILENT, 10 * (now.seconds or 0.0)):
        return [f"nothing logged for {duration(age)}: has it stopped?"]
    return [f"last logged {duration(max(age, 0.0))} ago"]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def line(now: Status) -> str:
    """Return the figures as one line of plain text."""
    total = f"/{now.total}" if now.total else ""
    parts = [
        f"iteration {now.iteration}{total}",
        f"loss {_number(now.loss, '.4f')}",
        f"learning rate {_number(now.learning_rate, '.3e')}",
        f"{_number(now.tokens_per_second, ',.0f')} tokens/s",
        f"MFU {_number(now.mfu, '.1%')}",
        f"ETA {duration(now.eta)}",
    ]
    return " | ".join(parts)


def duration(seconds: float | None) -> str:
    """Return a time span as days, hours:minutes:seconds."""
    return "-" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


def curve(series: Mapping[int, float]) -> str:
    """Return a series as a row of bars with its range, means over equal parts of the steps."""
    finite = {step: value for step, value in series.items() if math.isfinite(value)}
    if not finite:
        return ""
    first, steps = min(finite), max(finite) - min(finite) + 1
    columns = min(_CURVE, steps)
    buckets: list[list[float]] = [[] for _ in range(columns)]
    for step, value in finite.items():
        buckets[(step - first) * columns // steps].append(value)
    means: list[float] = []
    for values in buckets:  # a column between two logged steps repeats the one before
        means.append(statistics.fmean(values) if values else means[-1])
    low, high = min(means), max(means)
    top = len(_BARS) - 1
    bars = (_BARS[round((mean - low) / (high - low) * top) if high > low else 0] for mean in means)
    return f"{''.join(bars)} {low:.3g} to {high:.3g}"
