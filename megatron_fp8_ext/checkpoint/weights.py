"""The weights of a Megatron checkpoint, from main parameters or model weights, under Hugging Face names."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from megatron_fp8_ext.checkpoint import mapping
from megatron_fp8_ext.checkpoint.architecture import Architecture
from megatron_fp8_ext.checkpoint.buffers import BufferedMainParams, DoesNotFit
from megatron_fp8_ext.checkpoint.fp8 import slabs
from megatron_fp8_ext.checkpoint.mapping import Unit, check_shape
from megatron_fp8_ext.checkpoint.torch_dist import TorchDist
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.fp8 import reference
from megatron_fp8_ext.recipe import ScaleFormat

BF16 = torch.bfloat16

# FP32 main parameters: the plain and Megatron 0.14's optimizer, the fully reshardable one from 0.17.
_MAIN_PARAM = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?:fp32_param|param)\.(.+)")
_SCALE_FORMATS: tuple[ScaleFormat, ...] = ("power_of_two", "float32")
_NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state", "common_state", "opt_param_")


class MegatronWeights:
    """The weights of a Megatron checkpoint under Hugging Face names.

    Attributes:
        checkpoint: the open checkpoint.
        arch: the architecture, held to the checkpoint's own arguments and shapes.
        arguments: what Megatron stored of its command; empty where it stored nothing.
        from_main_params: whether tensors are read from the FP32 main parameters.
        notes: what was found on the way.
    """

    def __init__(
        self, checkpoint: TorchDist, arch: Architecture, use_main_params: bool = True
    ) -> None:
        self.checkpoint, self.arch = checkpoint, arch
        self.arguments = checkpoint.arguments()
        self.notes: list[str] = []
        self._check_arguments()
        self._names = self._resolve()
        main = {
            match.group(1): name
            for name in checkpoint.tensors
            if (match := _MAIN_PARAM.fullmatch(name))
        }
        wanted = {name for name, _ in self._names.values()}
        self._main = main if use_main_params and wanted <= set(main) else {}
        self._check_shapes()
        self._buffers: BufferedMainParams | None = None
        why = "" if use_main_params else "not asked for"
        if use_main_params and not self._main:
            self._buffers, why = self._open_buffers()
        self.from_main_params = bool(self._main) or self._buffers is not None
        self.notes.append(self._source_note(why))

    def _open_buffers(self) -> tuple[BufferedMainParams | None, str]:
        """Return main parameters without names, or why there are none."""
        if not any(".gbuf_idx_" in name for name in self.checkpoint.tensors):
            return None, "no main parameters in the checkpoint"
        try:
            return BufferedMainParams(self.checkpoint, self.arch, self.arguments), ""
        except DoesNotFit as error:
            return None, f"main parameters are whole buffers without names, and {error}"

    def _check_arguments(self) -> None:
        if not self.arguments:
            self.notes.append(
                "the checkpoint stores no arguments: heads, rotary base and epsilon are the reference's, "
                "unchecked"
            )
            return
        differences = self.arch.differences(self.arguments)
        if differences:
            raise UserError(
                f"{self.checkpoint.path} is another model than the reference: "
                f"{'; '.join(differences)}"
            )

    def _resolve(self) -> dict[tuple[str, int | None], tuple[str, int | None]]:
        """Return (stored name, index on its first axis) for each unit's (name, layer)."""
        stored = {
            name
            for name in self.checkpoint.tensors
            if not name.startswith(_NOT_WEIGHTS) and "optimizer.state." not in name
        }
        numbered = {n for n in stored if re.match(r"decoder\.layers\.\d+\.", n)}
        stacked = {n for n in stored if n.startswith("decoder.layers.")} - numbered
        if numbered and stacked:
            raise UserError(
                f"{self.checkpoint.path} stores layers both stacked ({min(stacked)}) and by number "
                f"({min(numbered)})"
            )
        names: dict[tuple[str, int | None], tuple[str, int | None]] = {}
        for unit in mapping.units(self.arch):
            name, layer = unit.megatron, unit.layer
            if layer is not None and numbered:
                name = name.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)
                layer = None
            if name not in stored:
                raise UserError(f"{self.checkpoint.path} has no {name}{self._why_missing(name)}")
            names[unit.megatron, unit.layer] = (name, layer)
        unknown = sorted(stored - {name for name, _ in names.values()})
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            tied = ""
            if unknown == ["output_layer.weight"]:
                tied = ": the checkpoint's LM head is its own, config.json ties it to the embedding"
            raise UserError(
                f"{self.checkpoint.path}: {unknown[0]}{more} has no place in a {self.arch.family} model"
                f"{tied or '; a row in checkpoint/mapping.py would give it one'}"
            )
        return names

    def _why_missing(self, name: str) -> str:
        if name == "output_layer.weight":
            return ": its LM head is tied to the embedding, config.json says it is not"
        return ", which the reference's architecture needs"

    def _check_shapes(self) -> None:
        for unit in mapping.units(self.arch):
            name, layer = self._names[unit.megatron, unit.layer]
            for stored in (name, self._main.get(name)):
                if stored is None:
                    continue
                shape = self.checkpoint.tensors[stored].shape
                if layer is not None:
                    if shape[0] != self.arch.num_layers:
                        raise UserError(
                            f"{self.checkpoint.path}: {stored} has {shape[0]} layers, config.json says "
                            f"{self.arch.num_layers}"
                        )
                    shape = shape[1:]
                if unit.row.layout is mapping.VOCABULARY and len(shape) == 2:
                    if shape[0] < self.arch.vocab_size:
                        raise UserError(
                            f"{self.checkpoint.path}: {stored} has {shape[0]} rows, the vocabulary of "
                            f"config.json {self.arch.vocab_size}: another tokenizer"
                        )
                    shape = (self.arch.vocab_size, *shape[1:])
                check_shape(stored, shape, unit.megatron_shape, str(self.checkpoint.path))

    def _source_note(self, why: str) -> str:
        if self.from_main_params:
            where = ""
            if self._buffers is not None:
                where = " (out of the optimizer's buffers, each value held to the weight beside it)"
            return (
                f"read from the FP32 main parameters{where}, rounded to BF16 as training rounds before it "
                "casts"
            )
        gathered = self.arguments.get("fp8_param_gather", self.arguments.get("fp8_param"))
        if gathered is False or (self.arguments and gathered is None):
            return f"read from the model's weights ({why}), which are the BF16 that training casts"
        return (
            f"read from the model's weights ({why}). Megatron saves FP8 weights dequantized: if these were "
            "FP8, an FP8 export has the same values, but a block whose maximum had been rounded to 224 gets "
            "doubled codes and a halved scale. To have training's codes, save with "
            "--dist-ckpt-optim-fully-reshardable and keep the optimizer state"
        )

    @property
    def tensor_parallel(self) -> int:
        """Tensor parallelism of the run that saved; 1 if unknown."""
        return int(self.arguments.get("tensor_model_parallel_size") or 1)

    @property
    def nbytes(self) -> int:
        """Bytes that reading everything takes."""
        return sum(self.unit_bytes(unit) for unit in mapping.units(self.arch))

    def unit_bytes(self, unit: Unit) -> int:
        """Bytes that reading one unit takes."""
        name, _ = self._names[unit.megatron, unit.layer]
        stored = self.checkpoint.tensors[self._main.get(name, name)]
        dtype: torch.dtype = getattr(torch, stored.dtype)
        of_buffers = 4 if self._buffers is not None else 0
        return math.prod(unit.megatron_shape) * (dtype.itemsize + of_buffers)

    def read(self, unit: Unit) -> dict[str, Tensor]:
        """Return a unit's Hugging Face tensors, BF16."""
        name, layer = self._names[unit.megatron, unit.layer]
        value = self.checkpoint.read(self._main.get(name, name), layer, dtype=BF16)
        if self._buffers is not None:
            value = self._held_to(value, unit, self._buffers)
        if unit.row.layout is mapping.VOCABULARY:
            value = value[: self.arch.vocab_size]
        parts = unit.row.layout.split(value, self.arch)
        return dict(zip(unit.hf, parts, strict=True))

    def _held_to(self, weight: Tensor, unit: Unit, buffers: BufferedMainParams) -> Tensor:
        """Return a main parameter, BF16, once every rank's part is what its weight was made from.

        Raises:
            UserError: it is not.
        """
        parts = buffers.read(unit)
        for main, stored in zip(parts, buffers.cut(unit, weight), strict=True):
            if not (torch.equal(main, stored) or (unit.row.fp8 and _is_cast_of(main, stored))):
                where = (
                    unit.megatron if unit.layer is None else f"{unit.megatron}, layer {unit.layer}"
                )
                raise UserError(
                    f"{self.checkpoint.path}: the main parameters in the optimizer's buffers do not round "
                    f"to the weights ({where}): one of them is of another state; convert the weights with "
                    "--no-main-params"
                )
        return buffers.join(unit, parts)


def _is_cast_of(main: Tensor, weight: Tensor) -> bool:
    """Whether `weight` is `main` (both BF16) through FP8 in 128x128 blocks, as Megatron saves it."""

    def cast(rows: slice, scale_format: ScaleFormat) -> Tensor:
        return reference.quantize_weight(main[rows], scale_format).dequantize(BF16)

    return any(
        all(torch.equal(cast(rows, how), weight[rows]) for rows in slabs(tuple(main.shape)))
        for how in _SCALE_FORMATS
    )
