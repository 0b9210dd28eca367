"""What a checkpoint says about its run: arguments, position in the data, state of the schedule.

Megatron pickles them (`common_state` inside the data files, up to 0.18 the file common.pt);
`safe_pickle.load_common` reads them, so that nothing of the checkpoint is ever executed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_fp8_ext.checkpoint import layout
from megatron_fp8_ext.checkpoint.safe_pickle import COMMON_LIMIT, Record, load_common
from megatron_fp8_ext.errors import UserError


@dataclass(frozen=True)
class TrainingState:
    """The common state of one checkpoint.

    Attributes:
        path: folder of the iteration.
        iteration: its number.
        args: Megatron's arguments of the run that saved it, by attribute name; plain values only.
        scheduler: state of the OptimizerParamScheduler; empty if it was not saved.
    """

    path: Path
    iteration: int
    args: Mapping[str, Any]
    scheduler: Mapping[str, Any]


def read_common(folder: Path, strict: bool) -> dict[str, Any] | None:
    """Return the common state as plain data and inert records; None where the checkpoint has none.

    Args:
        folder: of the iteration.
        strict: refuse calls of what does not belong there (`safe_pickle.load_common`).

    Raises:
        UserError: damaged, or refused.
    """
    try:
        with _open(folder) as file:
            return load_common(file, strict)
    except UserError:
        raise
    except _Absent:
        return None
    except Exception as error:  # a damaged file fails in any way
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"the state of {folder} cannot be read: {text}") from error


def read(folder: Path, iteration: int) -> TrainingState:
    """Return the common state of a `torch_dist` checkpoint.

    Raises:
        UserError: it has none, or it cannot be read.
    """
    state = read_common(folder, strict=False)
    if state is None:
        raise UserError(
            f"{folder} holds no training arguments (neither common.pt nor common_state)"
        )
    args, scheduler = state.get("args", {}), state.get("opt_param_scheduler") or {}
    args = vars(args) if isinstance(args, Record) else args
    if not isinstance(args, dict) or not isinstance(scheduler, dict):
        raise UserError(f"the state of {folder} cannot be read: its arguments are not by name")
    return TrainingState(folder, iteration, {k: v for k, v in args.items() if _plain(v)}, scheduler)


class _Absent(Exception):
    """The checkpoint has no common state."""


def _open(folder: Path) -> BinaryIO:
    legacy = folder / "common.pt"
    if legacy.is_file():
        return legacy.open("rb")
    for name, piece in layout.load_index(folder).stored:
        if name.startswith("common_state/"):
            if piece.length > COMMON_LIMIT:
                raise ValueError(f"common_state of {piece.length} bytes")
            with (folder / piece.file).open("rb") as file:
                file.seek(piece.offset)
                return io.BytesIO(file.read(piece.length))
    raise _Absent


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
