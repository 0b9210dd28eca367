"""Find a run's files below a folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp8_ext import training_log
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.watch import events, log_file
from megatron_fp8_ext.watch.events import EventFolder
from megatron_fp8_ext.watch.log_file import LogFile

_RECORD = "run.json"  # what `megatron-fp8 run` keeps (launch/start.py)
_HEAD = 200_000  # bytes of a log in which a training run has said that it is one


@dataclass(frozen=True)
class Found:
    """Where a run's numbers come from.

    Attributes:
        source: reader of the files written last.
        others: what else lies there and is not shown.
        name: preset of the run; empty if it was not started by `megatron-fp8 run`.
    """

    source: EventFolder | LogFile
    others: tuple[Path, ...]
    name: str


def find(folder: Path) -> Found:
    """Return the run below `folder` that wrote last: event files before logs.

    Raises:
        UserError: no such folder, or nothing in it that a run logged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the output folder of a run")
    folders = {path.parent for path in folder.rglob(events.PATTERN)}
    places = _newest(folders, lambda place: place.glob(events.PATTERN))
    source: EventFolder | LogFile
    if places:
        source = EventFolder(places[0])
    else:
        logs = {path for pattern in log_file.PATTERNS for path in folder.rglob(pattern)}
        places = _newest([log for log in logs if _trains(log)], lambda log: [log])
        if not places:
            raise UserError(
                f"{folder}: no event files ({events.PATTERN}) and no log of Megatron's (*.log) in it or "
                "below; give the run's output folder or its --tensorboard-dir. A run that has just started "
                "writes its first numbers after its first --log-interval"
            )
        source = LogFile(places[0])
    record = _record(source.readings.source, folder)
    # What the files say themselves is read later, and wins.
    source.readings.arguments.update(_arguments(record))
    return Found(source, tuple(places[1:]), str(record.get("preset", "")))


def _newest(places: Iterable[Path], files: Any) -> list[Path]:
    def written(place: Path) -> float:
        return max((file.stat().st_mtime for file in files(place)), default=0.0)

    return sorted(places, key=lambda place: (-written(place), str(place)))


def _trains(log: Path) -> bool:
    try:
        with log.open("rb") as file:
            lines = file.read(_HEAD).decode("utf-8", "replace").splitlines()
    except OSError:
        return False
    return any(training_log.parse_line(line) is not None for line in lines)


def _record(source: Path, folder: Path) -> dict[str, Any]:
    """run.json of the run, in the folder asked for or between it and its files."""
    for place in (*source.parents, source, folder):
        if place != folder and folder not in place.parents:
            continue
        try:
            data = json.loads((place / _RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(data, dict):
            return data
    return {}


def _arguments(record: dict[str, Any]) -> dict[str, str]:
    """The flags of a command as Megatron's arguments."""
    flags: Sequence[str] = [str(flag) for flag in record.get("flags") or ()]
    found = {
        flag[2:].replace("-", "_"): value
        for flag, value in itertools.pairwise(flags)
        if flag.startswith("--") and not value.startswith("--")
    }
    if "world_size" in record:
        found["world_size"] = str(record["world_size"])
    return found
