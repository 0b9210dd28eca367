"""Two checkpoints, tensor by tensor: Megatron, BF16 and FP8 folders in any combination.

Values are compared under Hugging Face names, FP8 dequantized; two FP8 folders also code by code. Two Megatron
checkpoints without a configuration are compared under Megatron's names.

Folders are read by ranges of rows, a Megatron checkpoint by tensors (its pieces are one blob each).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_fp8_ext.checkpoint import architecture, fp8, huggingface, mapping
from megatron_fp8_ext.checkpoint.architecture import BLOCK
from megatron_fp8_ext.checkpoint.huggingface import Folder
from megatron_fp8_ext.checkpoint.mapping import Unit
from megatron_fp8_ext.checkpoint.report import Progress, meter
from megatron_fp8_ext.checkpoint.torch_dist import TorchDist, open_checkpoint
from megatron_fp8_ext.checkpoint.weights import MegatronWeights
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.files import read_json
from megatron_fp8_ext.fp8.error import decibels, energies


class Values(Protocol):
    """A checkpoint as named values."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, in reading order."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor's values, or those of a range of its first axis that begins at a block."""

    def codes(self, name: str, rows: slice) -> tuple[Tensor, Tensor] | None:
        """Return an FP8 weight's codes and scales as stored; None for any other."""


class _HuggingFaceValues:
    def __init__(self, folder: Folder) -> None:
        fp8.is_block_fp8(folder)
        self.folder = folder
        names = [n for n in folder.entries if n.removesuffix(fp8.SCALE) not in folder.entries or
                 not n.endswith(fp8.SCALE)]  # fmt: skip
        self.shapes = {name: folder.entries[name].shape for name in names}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return fp8.read_dequantized(self.folder, name, rows)

    def codes(self, name: str, rows: slice) -> tuple[Tensor, Tensor] | None:
        if self.folder.entries[name].dtype != torch.float8_e4m3fn:
            return None
        blocks = slice(rows.start // BLOCK, -(-rows.stop // BLOCK))
        return self.folder.read(name, rows), self.folder.read(name + fp8.SCALE, blocks)


class _MegatronValues:
    def __init__(self, weights: MegatronWeights) -> None:
        self._weights = weights
        self._units = {name: u for u in mapping.units(weights.arch) for name in u.hf}
        self.shapes = {
            name: shape
            for unit in mapping.units(weights.arch)
            for name, shape in zip(unit.hf, unit.hf_shapes, strict=True)
        }
        self._last: tuple[Unit, dict[str, Tensor]] | None = None

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        unit = self._units[name]
        if self._last is None or self._last[0] is not unit:
            self._last = None  # first let go of what was read
            self._last = (unit, self._weights.read(unit))  # q, k and v are one read
        value = self._last[1][name]
        return value if rows is None else value[rows]

    def codes(self, name: str, rows: slice) -> tuple[Tensor, Tensor] | None:
        return None


class _NativeValues:
    """A Megatron checkpoint under its own names, `name[layer]` for stacked ones."""

    def __init__(self, checkpoint: TorchDist) -> None:
        self._checkpoint = checkpoint
        self._places: dict[str, tuple[str, int | None]] = {}
        self._last: tuple[str, Tensor] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, stored in sorted(checkpoint.tensors.items()):
            if "optimizer" in name:
                continue
            numbered = name.split(".")[2:3] and name.split(".")[2].isdigit()
            if not name.startswith("decoder.layers.") or numbered:
                self._places[name], self.shapes[name] = (name, None), stored.shape
                continue
            for layer in range(stored.shape[0]):
                self._places[f"{name}[{layer}]"] = (name, layer)
                self.shapes[f"{name}[{layer}]"] = stored.shape[1:]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self._checkpoint.read(*self._places[name]))
        return self._last[1] if rows is None else self._last[1][rows]

    def codes(self, name: str, rows: slice) -> tuple[Tensor, Tensor] | None:
        return None


def open_values(path: Path, config: dict[str, Any] | None, where: str) -> Values:
    """Open a checkpoint of any format.

    Args:
        path: a Hugging Face folder, or a Megatron checkpoint.
        config: configuration to map a Megatron checkpoint with; None for its own names.
        where: the configuration's path.
    """
    if (path / "config.json").is_file():
        return _HuggingFaceValues(huggingface.open_folder(path))
    checkpoint = open_checkpoint(path)
    if config is None:
        return _NativeValues(checkpoint)
    return _MegatronValues(MegatronWeights(checkpoint, architecture.from_config(config, where)))


def find_config(paths: Sequence[Path | None]) -> tuple[dict[str, Any] | None, str]:
    """Return the first config.json among some folders, and its path."""
    for path in paths:
        if path is not None and (path / "config.json").is_file():
            file = path / "config.json"
            return read_json(file, "copy the model again"), str(file)
    return None, ""


@dataclass(frozen=True)
class TensorRow:
    """One compared tensor.

    Attributes:
        name: of the tensor.
        max_error: largest absolute difference; inf where only one is finite.
        sqnr_db: signal to noise with A as the signal; inf where equal.
        bitwise: whether the values are equal bit for bit.
        codes: whether FP8 codes and scales are; None unless both are FP8.
    """

    name: str
    max_error: float
    sqnr_db: float
    bitwise: bool
    codes: bool | None


@dataclass(frozen=True)
class Comparison:
    """The result for all tensors, in A's order."""

    a: Path
    b: Path
    rows: tuple[TensorRow, ...]

    def summary(self) -> list[str]:
        """Return a few lines for people."""
        equal = sum(row.bitwise for row in self.rows)
        worst = min(self.rows, key=lambda row: row.sqnr_db)
        lines = [f"{equal} of {len(self.rows)} tensors are equal bit for bit"]
        if equal < len(self.rows):
            largest = max(row.max_error for row in self.rows)
            lines.append(
                f"largest error {largest:.3g}; lowest SQNR {worst.sqnr_db:.1f} dB ({worst.name})"
            )
        both = [row for row in self.rows if row.codes is not None]
        if both:
            same = sum(bool(row.codes) for row in both)
            lines.append(
                f"FP8 codes and scales: {same} of {len(both)} weights are equal bit for bit"
            )
        return lines

    def passes(self, bitwise: bool = False, min_sqnr: float | None = None) -> bool:
        """Whether it is as close as asked for."""
        if bitwise and not all(row.bitwise and row.codes is not False for row in self.rows):
            return False
        return min_sqnr is None or all(row.sqnr_db >= min_sqnr for row in self.rows)


def compare(
    a: Path, b: Path, hf_reference: Path | None = None, progress: Progress | None = None
) -> Comparison:
    """Compare two checkpoints; memory is the largest tensor of a Megatron checkpoint, or a few rows.

    Raises:
        UserError: one cannot be read; a name only one of them has; shapes that differ.
    """
    config, where = find_config((hf_reference, a, b))
    left, right = open_values(a, config, where), open_values(b, config, where)
    only = sorted(set(left.shapes) ^ set(right.shapes))
    if only:
        has, lacks = (a, b) if only[0] in left.shapes else (b, a)
        raise UserError(f"{only[0]} is in {has} and not in {lacks} ({len(only)} such tensors)")
    for name, shape in left.shapes.items():
        if shape != right.shapes[name]:
            raise UserError(f"{name} is {list(shape)} in {a} and {list(right.shapes[name])} in {b}")
    counter = meter(sum(4 * math.prod(shape) for shape in left.shapes.values()), progress)
    rows = []
    for name, shape in left.shapes.items():
        rows.append(_row(name, left, right))
        counter.add(4 * math.prod(shape))
    return Comparison(a, b, tuple(rows))


def _row(name: str, left: Values, right: Values) -> TensorRow:
    shape = left.shapes[name]
    bitwise, codes, error, signal, noise = True, None, 0.0, 0.0, 0.0
    for rows in fp8.slabs(shape) if shape else (None,):
        x, y = left.read(name, rows).to(torch.float32), right.read(name, rows).to(torch.float32)
        part = energies(x, y)
        signal += part[0]
        if not _same_bits(x, y):
            bitwise, noise = False, noise + part[1]
            error = max(error, (x - y).abs().nan_to_num(nan=math.inf).max().item())
        if rows is not None:
            ours, theirs = left.codes(name, rows), right.codes(name, rows)
            if ours is not None and theirs is not None:
                same = all(_same_bits(p, q) for p, q in zip(ours, theirs, strict=True))
                codes = same and codes is not False
    return TensorRow(name, error, decibels(signal, noise), bitwise, codes)


def _same_bits(x: Tensor, y: Tensor) -> bool:
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
