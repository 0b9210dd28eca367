"""Write a `torch_dist` checkpoint that stock Megatron loads, piece by piece."""

from __future__ import annotations

import json
import pickle
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp8_ext.files import sync

# One file for so many bytes, so that several ranks read in parallel.
_FILE_BYTES = 4 << 30


class TorchDistWriter:
    """Write a checkpoint piece by piece; the index last, so that an unfinished one never loads.

    Why not through Megatron's own save: that needs the whole model in memory, a process group and the
    Megatron of the day; these files are read by stock Megatron 0.14 to 0.19 at any TP and PP.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._file: Any = None
        self._files = 0
        self._shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._chunks: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        self._places: list[tuple[str, tuple[int, ...] | None, str, int, int]] = []

    def tensor(self, name: str, value: Tensor, layer: int | None = None, layers: int = 0) -> None:
        """Write a tensor, or one layer of a stacked one of `layers` layers."""
        shape, offsets = tuple(value.shape), (0,) * value.dim()
        whole = shape
        if layer is not None:
            shape, offsets, whole = (1, *shape), (layer, *offsets), (layers, *shape)
        self._shapes[name] = (value.dtype, whole)
        self._chunks.setdefault(name, []).append((offsets, shape))
        value = value.reshape(shape).contiguous()
        if value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()  # torch.save would write the whole storage of a view
        self._append(name, offsets, value)

    def empty_object(self, name: str) -> None:
        """Write an entry without content, as layers without FP8 history have in `_extra_state`."""
        self._append(name, None, [None])  # Megatron stores an object as a list of its local parts

    def _append(self, name: str, offsets: tuple[int, ...] | None, value: Any) -> None:
        if self._file is None or self._file.tell() >= _FILE_BYTES:
            self._close_file()
            self._file = (self._folder / f"__0_{self._files}.distcp").open("wb")
            self._files += 1
        start = self._file.tell()
        try:
            torch.save(value, self._file)
        except RuntimeError as error:  # torch's zip writer hides a full disk behind its own
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        place = (name, offsets, Path(self._file.name).name, start, self._file.tell() - start)
        self._places.append(place)

    def _close_file(self) -> None:
        if self._file is not None:
            sync(self._file)
            self._file.close()
            self._file = None

    def finish(self, arguments: Mapping[str, Any]) -> None:
        """Write the common state and the index.

        Args:
            arguments: Megatron arguments by name, plain values; Megatron compares them with the
                command on load, and takes them from here with `--use-checkpoint-args`.
        """
        from torch.distributed.checkpoint import filesystem, metadata

        self._close_file()
        common = {
            "args": Namespace(**arguments),
            "checkpoint_version": 3.0,
            "iteration": 0,
            "content_metadata": {},
        }
        with (self._folder / "common.pt").open("wb") as file:
            torch.save(common, file)
            sync(file)
        entries: dict[str, Any] = {}
        for name, (dtype, shape) in self._shapes.items():
            chunks = [
                metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                for offsets, sizes in self._chunks[name]
            ]
            properties = metadata.TensorProperties(dtype=dtype)
            entries[name] = metadata.TensorStorageMetadata(properties, torch.Size(shape), chunks)
        storage: dict[Any, Any] = {}
        for name, offsets, file_name, start, length in self._places:
            if offsets is None:
                entries[name] = metadata.BytesStorageMetadata()
                key = metadata.MetadataIndex(name)
            else:
                key = metadata.MetadataIndex(name, torch.Size(offsets))
            storage[key] = filesystem._StorageInfo(file_name, start, length)
        index = metadata.Metadata(entries, planner_data={}, storage_data=storage)
        with (self._folder / ".metadata").open("wb") as file:
            pickle.dump(index, file)
            sync(file)
        # Megatron up to 0.18 asks for the two fields of the common state.
        formats = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        with (self._folder / "metadata.json").open("w") as text:
            json.dump(formats, text)
            sync(text)
