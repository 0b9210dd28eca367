"""`--fp8-stats-interval N`, `--fp8-stats-dir DIR`: what the numerics taps (`taps`) are asked for. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import arguments

INTERVAL = "--fp8-stats-interval"
DIRECTORY = "--fp8-stats-dir"


@dataclass(frozen=True)
class Stats:
    """Numerics taps: sample every `interval` iterations into JSON lines under `directory`."""

    interval: int
    directory: str

    @property
    def note(self) -> str:
        """The line for rank 0."""
        return f"{INTERVAL} {self.interval}: errors of the casts go to {self.directory}"


def take(argv: Sequence[str]) -> tuple[list[str], Stats | None]:
    """Return `argv` without the two flags, and what they ask for (None without them).

    Raises:
        UserError: no positive number, nowhere to write, or CUDA graphs beside it.
    """
    if not arguments.has(argv, INTERVAL) and not arguments.has(argv, DIRECTORY):
        return list(argv), None
    stats = _read(argv)
    rest = list(argv)
    for flag in (INTERVAL, DIRECTORY):
        rest = arguments.without(rest, flag, takes_value=True)
    return rest, stats


def _read(argv: Sequence[str]) -> Stats:
    written = arguments.value(argv, INTERVAL)
    if written is None or not written.isdigit() or int(written) == 0:
        raise UserError(
            f"{INTERVAL} {written or 'without a value'}: it takes a number of iterations, such as 100"
        )
    graphs = arguments.first_written(argv, ("--enable-cuda-graph", "--external-cuda-graph"))
    if arguments.value(argv, "--cuda-graph-impl") not in (None, "none"):
        graphs = "--cuda-graph-impl"
    if graphs is not None:
        raise UserError(
            f"{INTERVAL} contradicts {graphs}: a replayed graph runs no Python, so nothing "
            "could be sampled; drop one of the two"
        )
    for flag in (DIRECTORY, "--tensorboard-dir", "--save"):
        directory = arguments.value(argv, flag)
        if directory is not None:
            return Stats(int(written), directory)
    raise UserError(f"{INTERVAL} has nowhere to write: add {DIRECTORY} DIR")
