"""The safetensors format, one tensor at a time.

Eight bytes of header length, a JSON header (`{name: {dtype, shape, data_offsets}}`), then the data. The
`safetensors` package maps a whole file and writes a whole file; here a tensor is read with one `pread`
and written with one `pwrite`, so memory is one tensor whatever the shard size, and a damaged file is
named before any work starts. Tests hold both directions to the package.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.files import sync

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The package's own limit: a longer header is damage.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """One stored tensor: where it is and what it is."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Entry]:
    """Return the tensors of one file, by name.

    Raises:
        UserError: missing, truncated, or not a safetensors file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > _MAX_HEADER:
                raise UserError(f"{path} is not a safetensors file")
            if size < 8 + length:
                raise UserError(f"{path} is truncated inside its header; copy it again")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; copy the checkpoint again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not a safetensors file: its header: {error}") from error
    entries: dict[str, Entry] = {}
    end = 0
    try:
        for name, value in header.items():
            if name == "__metadata__":
                continue
            if value["dtype"] not in DTYPES:
                raise UserError(
                    f"{path}: {name} has dtype {value['dtype']}, which is not supported"
                )
            start, stop = value["data_offsets"]
            shape = tuple(int(n) for n in value["shape"])
            entry = Entry(name, DTYPES[value["dtype"]], shape, path, 8 + length + start)
            if stop - start != entry.nbytes or start < 0 or min(shape, default=0) < 0:
                raise UserError(
                    f"{path}: {name} {value['dtype']} {list(shape)} takes {entry.nbytes} bytes, the "
                    f"header says {stop - start}: the file is damaged"
                )
            entries[name], end = entry, max(end, stop)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a safetensors file: its header: {error!r}") from error
    if size < 8 + length + end:
        raise UserError(
            f"{path} is truncated: {size} bytes of {8 + length + end}; copy the checkpoint again"
        )
    return entries


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice}' is there twice")
    return found


def read(entry: Entry, rows: slice | None = None) -> Tensor:
    """Return the tensor, or a range of its first axis; memory is the result's size.

    Args:
        entry: what to read.
        rows: with both ends, step 1, inside of the tensor.

    Raises:
        UserError: the file changed under us.
    """
    shape, start = entry.shape, entry.start
    if rows is not None:
        shape = (rows.stop - rows.start, *entry.shape[1:])
        start += rows.start * math.prod(entry.shape[1:]) * entry.dtype.itemsize
    buffer = bytearray(math.prod(shape) * entry.dtype.itemsize)
    view, done = memoryview(buffer), 0
    try:
        with entry.file.open("rb", buffering=0) as file:
            file.seek(start)
            while done < len(buffer):
                count = file.readinto(view[done:])
                if not count:
                    raise UserError(f"{entry.file} is truncated; copy the checkpoint again")
                done += count
    except OSError as error:
        raise UserError(f"{entry.file} cannot be read: {error}") from error
    if not buffer:
        return torch.empty(shape, dtype=entry.dtype)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(entry.dtype).reshape(shape)


class FileWriter:
    """Write one file whose tensors are known beforehand, in any order."""

    def __init__(
        self, path: Path, specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        # Widest dtype first, as the package orders them: then every tensor starts aligned.
        names = sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._specs, self._starts = specs, {}
        position = 0
        for name in names:
            dtype, shape = specs[name]
            end = position + math.prod(shape) * dtype.itemsize
            offsets = [position, end]
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": offsets,
            }
            self._starts[name], position = position, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data, self._missing = 8 + len(text), set(names)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data + position)

    def write(self, name: str, value: Tensor) -> None:
        """Write one tensor.

        Raises:
            ValueError: not the tensor that was announced (a bug of ours).
        """
        if (value.dtype, tuple(value.shape)) != self._specs[name] or name not in self._missing:
            raise ValueError(f"{name}: {value.dtype} {tuple(value.shape)} was not announced")
        self._missing.remove(name)
        self._file.seek(self._data + self._starts[name])
        flat = value.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            self._file.write(memoryview(flat.view(torch.uint8).numpy()))

    def close(self) -> None:
        """Finish the file and wait until the disk has it."""
        if self._missing:
            raise ValueError(f"never written: {sorted(self._missing)}")
        sync(self._file)
        self._file.close()
