"""What a checkpoint says about its run: arguments, position in the data, state of the schedule.

Megatron pickles them (`common_state` inside the data files, up to 0.18 the file common.pt). Here every
class in that pickle becomes an inert record, so that nothing of the checkpoint is ever executed.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_fp8_ext.checkpoint import layout
from megatron_fp8_ext.checkpoint.safe_pickle import Record
from megatron_fp8_ext.errors import UserError

_LIMIT = 256 << 20  # bytes; a real one has tens of kilobytes


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


class _Inert(Record):
    """Stand-in that also swallows what a pickle puts into containers."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("collections", "OrderedDict"), ("builtins", "dict")):
            return dict
        return type(str(name), (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        return None  # a tensor


def read(folder: Path, iteration: int) -> TrainingState:
    """Return the common state of a `torch_dist` checkpoint.

    Raises:
        UserError: it has none, or it cannot be read.
    """
    try:
        with _open(folder) as file:
            state = _load(file)
        args = vars(state["args"]) if "args" in state else {}
        scheduler = state.get("opt_param_scheduler") or {}
        if not isinstance(scheduler, dict):
            raise ValueError("opt_param_scheduler is not a dict")
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in any way
        raise UserError(f"the state of {folder} cannot be read: {error!r}") from error
    return TrainingState(folder, iteration, {k: v for k, v in args.items() if _plain(v)}, scheduler)


def _open(folder: Path) -> BinaryIO:
    legacy = folder / "common.pt"
    if legacy.is_file():
        return legacy.open("rb")
    for name, piece in layout.load_index(folder).stored:
        if name.startswith("common_state/"):
            if piece.length > _LIMIT:
                raise ValueError(f"common_state of {piece.length} bytes")
            with (folder / piece.file).open("rb") as file:
                file.seek(piece.offset)
                return io.BytesIO(file.read(piece.length))
    raise UserError(f"{folder} holds no training arguments (neither common.pt nor common_state)")


def _load(file: BinaryIO) -> dict[str, Any]:
    """Read what torch.save wrote, tensors left out."""
    with zipfile.ZipFile(file) as archive:
        (name,) = (x for x in archive.namelist() if x.endswith("/data.pkl"))
        if archive.getinfo(name).file_size > _LIMIT:
            raise ValueError(f"a pickle of {archive.getinfo(name).file_size} bytes")
        found = _Unpickler(io.BytesIO(archive.read(name))).load()
    if isinstance(found, list) and len(found) == 1:
        found = found[0]  # a ShardedObject's data
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} instead of a dict")
    return found


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
