"""Megatron's `torch_dist` format, without Megatron: stream tensors out of a checkpoint.

A folder holds `.metadata` (a pickle: the index), `__R_W.distcp` (one `torch.save` blob for each piece of
a tensor) and `metadata.json`. Values that are no tensors are in `common.pt` up to Megatron 0.18, and in
the blob `common_state` from 0.19. The index and the common state go through `safe_pickle`; tensor
blobs through `torch.load(weights_only=True)`, so no class outside of torch's own list is ever built.

Layers of one shape are stored stacked, `[L, ...]` under a name without a number, in pieces of one layer.
Whatever tensor and pipeline parallelism wrote them, the pieces have global coordinates.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp8_ext.checkpoint import layout, state
from megatron_fp8_ext.checkpoint.safe_pickle import IndexUnpickler, Record
from megatron_fp8_ext.errors import UserError


@dataclass(frozen=True)
class Piece:
    """A stored box of a tensor: its place in the tensor, and its blob's place on disk."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the index.

    Attributes:
        name: global name, without a layer number where layers are stacked.
        shape: global shape.
        dtype: torch's name of it, such as `bfloat16`.
        pieces: boxes that cover it.
        fragments: for a tensor the distributed optimizer of Megatron 0.14 flattened: into how many
            boxes each axis was cut; its pieces then lie in `[*fragments, numel of a box]`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]
    fragments: tuple[int, ...] | None = None


class TorchDist:
    """A checkpoint open for reading.

    Attributes:
        path: folder of the iteration.
        tensors: what the index names.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = _read_index(path)

    def read(self, name: str, layer: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return one tensor, or one layer of a stacked one (without the first axis).

        Memory: the result, and the largest piece. Rounding to `dtype` is to nearest even.

        Raises:
            UserError: a file is missing, truncated or holds something else; a part is not covered.
        """
        stored = self.tensors[name]
        out = self._read_box(stored, _box(stored.shape, layer), dtype)
        return out[0] if layer is not None else out

    def read_range(
        self, name: str, start: int, stop: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return a range of a flat tensor, rounded to `dtype`.

        Raises:
            UserError: as `read`.
        """
        return self._read_box(self.tensors[name], [(start, stop)], dtype)

    def _read_box(
        self, stored: StoredTensor, at: list[tuple[int, int]], dtype: torch.dtype | None
    ) -> Tensor:
        out = torch.empty(
            [hi - lo for lo, hi in at], dtype=dtype or getattr(torch, stored.dtype), device="cpu"
        )
        covered = 0
        for piece in stored.pieces:
            if stored.fragments is None:
                covered += self._copy_box(stored, piece, at, out)
            else:
                covered += self._copy_flat(stored, piece, at, out)
        if covered != out.numel():
            raise UserError(
                f"{self.path}: {stored.name} is stored in pieces that hold {covered} of the {out.numel()} "
                "values read: the checkpoint is incomplete; save it again"
            )
        return out

    def _copy_box(
        self, stored: StoredTensor, piece: Piece, at: list[tuple[int, int]], out: Tensor
    ) -> int:
        source, target = [], []
        for (lo, hi), offset, size in zip(at, piece.offsets, piece.sizes, strict=True):
            start, stop = max(lo, offset), min(hi, offset + size)
            if start >= stop:
                return 0
            source.append(slice(start - offset, stop - offset))
            target.append(slice(start - lo, stop - lo))
        part = self._load(stored, piece)[tuple(source)]
        out[tuple(target)].copy_(part)
        return part.numel()

    def _copy_flat(
        self, stored: StoredTensor, piece: Piece, at: list[tuple[int, int]], out: Tensor
    ) -> int:
        assert stored.fragments is not None
        box = [size // cut for size, cut in zip(stored.shape, stored.fragments, strict=True)]
        corner = [index * size for index, size in zip(piece.offsets[:-1], box, strict=True)]
        target = []
        for (lo, hi), start, size in zip(at, corner, box, strict=True):
            if start + size <= lo or start >= hi:
                return 0
            if start < lo or start + size > hi:
                raise UserError(f"{self.path}: {stored.name} mixes layers in one flattened box")
            target.append(slice(start - lo, start + size - lo))
        flat = self._load(stored, piece).reshape(-1)
        first = piece.offsets[-1]
        # A box may be non-contiguous in the result, so it is filled through a copy of its own.
        values = out[tuple(target)].contiguous()
        values.view(-1)[first : first + flat.numel()].copy_(flat)
        out[tuple(target)].copy_(values)
        return flat.numel()

    def _load(self, stored: StoredTensor, piece: Piece) -> Tensor:
        where = f"{self.path / piece.file}: {stored.name}"
        try:
            with (self.path / piece.file).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < piece.start + piece.length:
                    raise UserError(
                        f"{where}: the file ends at byte {size}, the index needs "
                        f"{piece.start + piece.length}: it is truncated; copy the checkpoint again"
                    )
                blob = _Slice(file, piece.start, piece.length)
                value = torch.load(blob, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise UserError(f"{where}: the file is missing; copy the checkpoint again") from error
        except UserError:
            raise
        except Exception as error:  # a damaged blob fails in any way
            raise UserError(f"{where}: cannot be read: {_one_line(error)}") from error
        if not isinstance(value, Tensor) or tuple(value.shape) != piece.sizes:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{where}: expected a tensor {piece.sizes}, found {found}")
        if str(value.dtype) != f"torch.{stored.dtype}":
            raise UserError(f"{where}: expected {stored.dtype}, found {value.dtype}")
        return value

    def arguments(self) -> dict[str, Any]:
        """Return the arguments Megatron stored with the checkpoint; empty where it stored none.

        Raises:
            UserError: damaged, or it names something that common state does not consist of.
        """
        arguments = (state.read_common(self.path, strict=True) or {}).get("args")
        return dict(vars(arguments)) if isinstance(arguments, Record) else {}


class _Slice(io.RawIOBase):
    """`length` bytes of a file from `start`, as a file of its own (nothing is read ahead)."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + {0: 0, 1: self._at, 2: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(self._length - self._at, 0)]
        if not len(view):
            return 0
        self._file.seek(self._start + self._at)
        count: int = self._file.readinto(view)
        self._at += count
        return count


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _box(shape: tuple[int, ...], layer: int | None) -> list[tuple[int, int]]:
    box = [(0, size) for size in shape]
    if layer is not None:
        box[0] = (layer, layer + 1)
    return box


def _read_index(path: Path) -> dict[str, StoredTensor]:
    index = path / ".metadata"
    if not index.is_file():
        raise UserError(f"{path} is no torch_dist checkpoint: it has no .metadata")
    try:
        with index.open("rb") as file:
            metadata = IndexUnpickler(file).load()
        return _understand(metadata, path)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle fails in any way
        raise UserError(f"checkpoint index {index} cannot be read: {_one_line(error)}") from error


def _understand(metadata: Any, path: Path) -> dict[str, StoredTensor]:
    places: dict[tuple[str, tuple[int, ...] | None], Any] = {}
    for key, info in metadata.storage_data.items():
        if getattr(info, "transform_descriptors", None):
            raise UserError(f"{path}: {key.fqn} is stored compressed; save it uncompressed")
        offset = getattr(key, "offset", None)
        places[key.fqn, None if offset is None else _ints(offset)] = info
    original = getattr(metadata, "mcore_data", None) or {}
    tensors: dict[str, StoredTensor] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not hasattr(entry, "size"):
            continue  # no tensor
        pieces = []
        for chunk in entry.chunks:
            offsets, sizes = _ints(chunk.offsets), _ints(chunk.sizes)
            # A tensor that one rank holds whole may be indexed without an offset.
            info = places.get((name, offsets)) or places[name, None]
            pieces.append(_piece(info, offsets, sizes))
        shape, fragments = _ints(entry.size), None
        flattened = original.get(name, {}).get("nd_reformulated_orig_global_shape")
        if flattened is not None:
            shape, fragments = _ints(flattened), shape[:-1]
        tensors[name] = StoredTensor(name, shape, _dtype(entry), tuple(pieces), fragments)
    return tensors


def _dtype(entry: Any) -> str:
    properties = entry.properties
    state = properties.state
    dtype = state[0] if isinstance(state, tuple) else properties.__dict__.get("dtype")
    if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}")
    return dtype


def _piece(info: Any, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Piece:
    name = info.relative_path
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"a piece lies outside of the checkpoint folder: {name!r}")
    return Piece(offsets, sizes, name, int(info.offset), int(info.length))


def _ints(sizes: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in sizes)


def open_checkpoint(path: Path, step: str | None = None) -> TorchDist:
    """Open a checkpoint: the folder Megatron saves into, or one iteration's folder.

    Args:
        path: what `--save` named, or `iter_0005000` in it.
        step: iteration, as `--ckpt-step`; the latest without it.

    Raises:
        UserError: nothing there, or damaged.
    """
    if (path / ".metadata").is_file() and step is None:
        return TorchDist(path)
    found = layout.find(str(path), step)
    if found is None:
        raise UserError(
            f"{path} holds no Megatron checkpoint: neither latest_checkpointed_iteration.txt nor "
            ".metadata is there"
        )
    return TorchDist(found.path)
