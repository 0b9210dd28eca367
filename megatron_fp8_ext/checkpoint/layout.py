"""What a Megatron checkpoint contains, from its index alone: tensor shapes and optimizer layout.

The index of a `torch_dist` checkpoint (`.metadata`) is a pickle; `safe_pickle` reads it as plain data.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_fp8_ext.checkpoint.safe_pickle import IndexUnpickler
from megatron_fp8_ext.errors import UserError

OptimizerLayout = Literal["none", "plain", "whole buffers", "by parameter", "unknown"]
TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class CheckpointLayout:
    """A checkpoint's contents.

    Attributes:
        path: folder of the iteration.
        iteration: its number; 0 for a release checkpoint.
        shapes: global shape of each model tensor, by name; empty where the format hides them.
        optimizer: how the optimizer state is stored. `whole buffers` is the distributed optimizer's
            default (`dp_reshardable`), bound to the dtypes of the run; `by parameter` its fully
            reshardable form; `plain` the optimizer without distribution.
        fp8_params: whether the buffers were those of FP8 weights.
    """

    path: Path
    iteration: int
    shapes: dict[str, tuple[int, ...]]
    optimizer: OptimizerLayout
    fp8_params: bool = False


def find(load: str, step: str | None = None) -> CheckpointLayout | None:
    """Return the layout of what Megatron would load from `--load LOAD [--ckpt-step STEP]`.

    Returns None where there is no checkpoint yet (Megatron then starts from scratch).

    Raises:
        UserError: the folder names a checkpoint that is not there or cannot be read.
    """
    root = Path(load)
    tracker = root / TRACKER
    if step is None and not tracker.is_file():
        return None
    try:
        latest = step if step is not None else tracker.read_text().strip()
    except OSError as error:
        raise UserError(f"--load {load}: cannot read {TRACKER}: {error}") from error
    if latest == "release":
        folder, iteration = root / "release", 0
    elif latest.isdigit():
        iteration = int(latest)
        folder = root / f"iter_{iteration:07d}"
    else:
        raise UserError(f"--load {load}: {TRACKER} says '{latest}', neither a number nor 'release'")
    if not folder.is_dir():
        raise UserError(
            f"--load {load}: {TRACKER if step is None else '--ckpt-step'} names iteration "
            f"{latest}, but {folder.name} is not there; give a --ckpt-step that is"
        )
    return read(folder, iteration)


@dataclass(frozen=True)
class Stored:
    """Where one piece of a checkpoint lies: file name in its folder, offset and length in bytes."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Index:
    """A `.metadata` file: global shape of each entry (None for objects), and every stored piece."""

    entries: dict[str, tuple[int, ...] | None]
    stored: list[tuple[str, Stored]]


def load_index(folder: Path) -> Index:
    """Read the index of one iteration's folder.

    Raises:
        UserError: no index, a damaged one, or one with something an index never holds.
    """
    path = folder / ".metadata"
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"checkpoint index {path} cannot be read: {error}") from error
    return _load_index(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)  # read for shapes, for completeness and for the state
def _load_index(path: Path, modified: int, size: int) -> Index:
    try:
        with path.open("rb") as file:
            index = IndexUnpickler(file).load()
        entries = {
            name: tuple(int(n) for n in entry.size) if hasattr(entry, "size") else None
            for name, entry in index.state_dict_metadata.items()
        }
        stored = []
        for key, info in (getattr(index, "storage_data", None) or {}).items():
            name = str(info.relative_path)
            if Path(name).name != name:
                raise ValueError(f"it names the file {name!r} outside of the checkpoint folder")
            stored.append((str(key.fqn), Stored(name, int(info.offset), int(info.length))))
    except Exception as error:  # a damaged pickle fails in any way
        raise UserError(f"checkpoint index {path} cannot be read: {error}") from error
    return Index(entries, stored)


def read(folder: Path, iteration: int) -> CheckpointLayout:
    """Return the layout of one iteration's folder.

    Raises:
        UserError: the index is damaged, or holds something an index never holds.
    """
    if not (folder / ".metadata").is_file():
        return CheckpointLayout(folder, iteration, {}, "unknown")
    entries = load_index(folder).entries
    shapes = {name: size for name, size in entries.items() if size is not None}
    optimizer: OptimizerLayout = "none"
    names = [name for name in entries if "optimizer." in name]
    buffers = [name for name in names if ".gbuf_idx_" in name]
    if buffers:
        optimizer = "whole buffers"
    elif any(name.startswith("optimizer.state.fp32_param.") for name in names):
        optimizer = "plain"
    elif any(name.startswith("optimizer.state.param.") for name in names):
        optimizer = "by parameter"
    elif names:
        optimizer = "unknown"
    return CheckpointLayout(
        path=folder,
        iteration=iteration,
        shapes={name: size for name, size in shapes.items() if not name.startswith("optimizer.")},
        optimizer=optimizer,
        fp8_params=any("dtype_(torch.uint8" in name for name in buffers),
    )
