"""A Hugging Face folder: config.json, safetensors (one file or shards with an index), all other files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp8_ext.checkpoint import output, safetensors
from megatron_fp8_ext.checkpoint.safetensors import Entry, FileWriter
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.files import read_json, sync

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

# Weights in any format, and what describes their files: never copied along.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_WEIGHT_FILES = (INDEX, "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Folder:
    """A folder open for reading.

    Attributes:
        path: the folder.
        config: config.json.
        entries: its tensors by name; empty where it holds no weights.
    """

    path: Path
    config: dict[str, Any]
    entries: dict[str, Entry]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor as it is stored, or a range of its first axis."""
        return safetensors.read(self.entries[name], rows)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The configuration of quantized weights, if they are."""
        found = self.config.get("quantization_config")
        return found if isinstance(found, dict) else None


def open_folder(path: Path, weights: bool = True) -> Folder:
    """Open a folder and check its files.

    Args:
        path: with config.json in it.
        weights: whether it must hold weights.

    Raises:
        UserError: a file is missing, damaged, truncated, or holds a name twice.
    """
    config = read_json(path / "config.json", "give a Hugging Face model folder")
    entries = _entries(path)
    if weights and not entries:
        hint = ""
        if any(path.glob("*.bin")):
            hint = " (its .bin files are pickles; save the model as safetensors)"
        raise UserError(f"{path} holds no {SINGLE} and no {INDEX}{hint}")
    return Folder(path, config, entries)


def _entries(path: Path) -> dict[str, Entry]:
    if not (path / INDEX).is_file():
        if (path / SINGLE).is_file():
            return safetensors.read_header(path / SINGLE)
        shards = sorted(path.glob("*.safetensors"))
        if shards:
            raise UserError(
                f"{path} holds {shards[0].name} but neither {SINGLE} nor {INDEX}; copy the index too"
            )
        return {}
    names = read_json(path / INDEX, "copy the model again").get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{path / INDEX} has no weight_map")
    entries: dict[str, Entry] = {}
    for file in sorted(set(names.values())):
        if Path(file).name != file:
            raise UserError(f"{path / INDEX} names a file outside of the folder: {file}")
        for name, entry in safetensors.read_header(path / file).items():
            if name in entries:
                raise UserError(f"{path}: {name} is in {entries[name].file.name} and in {file}")
            if names.get(name) != file:
                where = names.get(name, "nowhere")
                raise UserError(f"{path}: {name} is in {file}, {INDEX} says {where}")
            entries[name] = entry
    missing = sorted(set(names) - set(entries))
    if missing:
        raise UserError(f"{path}: {missing[0]} is in {INDEX} but not in {names[missing[0]]}")
    return entries


def other_files(path: Path) -> Iterator[Path]:
    """Yield the files of a folder that are neither weights nor config.json: tokenizer and so on."""
    for file in sorted(path.iterdir()):
        if not file.is_file() or file.name == "config.json" or file.name in _WEIGHT_FILES:
            continue
        if not file.name.endswith(_WEIGHT_SUFFIXES):
            yield file


class FolderWriter:
    """Write a folder's weights tensor by tensor, in any order."""

    def __init__(self, path: Path, specs: Specs, shard_bytes: int = SHARD_BYTES) -> None:
        """Plan the shards.

        Args:
            path: an existing folder.
            specs: dtype and shape of every tensor, in the order in which they will come.
            shard_bytes: largest shard; one tensor may be larger.
        """
        self._path = path
        shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
        size = 0
        for name, (dtype, shape) in specs.items():
            nbytes = math.prod(shape) * dtype.itemsize
            if shards[-1] and size + nbytes > shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = (dtype, shape)
            size += nbytes
        count = len(shards)
        self._files = {
            SINGLE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors": shard
            for i, shard in enumerate(shards, start=1)
        }
        self._file_of = {name: file for file, shard in self._files.items() for name in shard}
        self._left = {file: len(shard) for file, shard in self._files.items()}
        self._open: dict[str, FileWriter] = {}
        self.nbytes = total_bytes(specs)

    def write(self, name: str, value: Tensor) -> None:
        """Write one of the planned tensors; a finished shard is closed."""
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = FileWriter(self._path / file, self._files[file])
        self._open[file].write(name, value)
        self._left[file] -= 1
        if not self._left[file]:
            self._open.pop(file).close()

    def finish(self, config: Mapping[str, Any], copy_from: Path | None) -> None:
        """Write config.json and the index, and copy every other file of `copy_from`."""
        unfinished = [file for file, left in self._left.items() if left]
        if unfinished:
            raise ValueError(f"never completed: {unfinished}")
        write_json(self._path / "config.json", config)
        if len(self._files) > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": self._file_of}
            write_json(self._path / INDEX, index)
        if copy_from is not None:
            for file in other_files(copy_from):
                output.copy(file, self._path / file.name)


def total_bytes(specs: Specs) -> int:
    """Return the bytes the tensors take."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON as transformers does, and sync it."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        sync(file)
