"""Megatron checkpoint <-> Hugging Face folder, bit for bit and tensor by tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp8_ext.checkpoint import architecture, huggingface, mapping, output
from megatron_fp8_ext.checkpoint.architecture import Architecture
from megatron_fp8_ext.checkpoint.buffers import BufferedMainParams, DoesNotFit
from megatron_fp8_ext.checkpoint.fp8 import slabs
from megatron_fp8_ext.checkpoint.huggingface import Folder
from megatron_fp8_ext.checkpoint.mapping import Unit, check_shape
from megatron_fp8_ext.checkpoint.report import Progress, Report, meter
from megatron_fp8_ext.checkpoint.torch_dist import TorchDist, open_checkpoint
from megatron_fp8_ext.checkpoint.torch_dist_writer import TorchDistWriter
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.files import sync
from megatron_fp8_ext.fp8 import reference
from megatron_fp8_ext.recipe import ScaleFormat

FLAGS_FILE = "megatron_flags.txt"
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


def megatron_to_hf(
    source: Path,
    target: Path,
    reference: Path,
    *,
    step: str | None = None,
    use_main_params: bool = True,
    shard_bytes: int = huggingface.SHARD_BYTES,
    progress: Progress | None = None,
) -> Report:
    """Convert a `torch_dist` checkpoint, saved at any TP and PP, to a BF16 Hugging Face folder.

    Args:
        source: what `--save` named, or one iteration's folder.
        target: must not exist.
        reference: folder whose config.json describes the model; all its files but weights are copied.
        step: iteration, as `--ckpt-step`.
        use_main_params: read the FP32 main parameters where the checkpoint has them.
        shard_bytes: largest shard of the output.
        progress: see `report.Progress`.

    Raises:
        UserError: missing, damaged or foreign files; any tensor without a place; any shape that differs.
    """
    folder = huggingface.open_folder(reference, weights=False)
    arch = architecture.from_config(folder.config, str(reference / "config.json"))
    weights = MegatronWeights(open_checkpoint(source, step), arch, use_main_params)
    specs = hf_specs(arch)
    _check_reference(folder, specs)
    notes = [*weights.notes]
    if weights.arguments:
        notes += _block_notes(arch, weights.tensor_parallel)
    config = {key: value for key, value in folder.config.items() if key != "quantization_config"}
    config["dtype" if "dtype" in config else "torch_dtype"] = "bfloat16"
    counter = meter(weights.nbytes, progress)
    with output.folder(target, huggingface.total_bytes(specs)) as partial:
        writer = huggingface.FolderWriter(partial, specs, shard_bytes)
        for unit in mapping.units(arch):
            for name, value in weights.read(unit).items():
                writer.write(name, value)
            counter.add(weights.unit_bytes(unit))
        writer.finish(config, copy_from=reference)
    return Report(target, len(specs), counter.done, counter.seconds, tuple(notes))


def hf_specs(arch: Architecture) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of every tensor of a BF16 Hugging Face model, in writing order."""
    return {
        name: (BF16, shape)
        for unit in mapping.units(arch)
        for name, shape in zip(unit.hf, unit.hf_shapes, strict=True)
    }


def _block_notes(arch: Architecture, tensor_parallel: int) -> list[str]:
    reasons = arch.block_mismatches(tensor_parallel)
    if not reasons:
        return [
            f"128x128 blocks are training's own (TP={tensor_parallel}): FP8 codes will be bitwise equal"
        ]
    return [
        f"128x128 blocks are not training's own (TP={tensor_parallel}), so FP8 codes of these differ: {r}"
        for r in reasons
    ]


def _check_reference(folder: Folder, specs: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Hold what will be written to the weights of the reference, if it has any."""
    if not folder.entries:
        return
    found = {n: e.shape for n, e in folder.entries.items() if not _ignorable(n)}
    for name, (_, shape) in specs.items():
        if name not in found:
            raise UserError(f"{folder.path} has no {name}, which its config.json needs")
        check_shape(name, found[name], shape, str(folder.path))
    extra = sorted(set(found) - set(specs) - {f"{n}_scale_inv" for n in specs} - {"lm_head.weight"})
    if extra:
        raise UserError(f"{folder.path}: {extra[0]} has no counterpart in the checkpoint")


def _ignorable(name: str) -> bool:
    """Old Llama files store RoPE's frequencies, which follow from the configuration."""
    return name.endswith("rotary_emb.inv_freq")


def hf_to_megatron(
    source: Path,
    target: Path,
    *,
    tensor_parallel: int = 1,
    progress: Progress | None = None,
) -> Report:
    """Convert a Hugging Face folder to a checkpoint that Megatron loads with `--load` at any TP and PP.

    It is a release checkpoint: Megatron starts at iteration 0 with a new optimizer and scheduler. The
    flags of the architecture are the report's first note and the file megatron_flags.txt.

    Args:
        source: folder with config.json and safetensors of BF16, FP16 or FP32 (rounded to BF16).
        target: must not exist.
        tensor_parallel: of the run to come; only the printed vocabulary padding depends on it.
        progress: see `report.Progress`.

    Raises:
        UserError: missing, damaged or foreign files; any tensor without a place; any shape that differs.
    """
    folder = huggingface.open_folder(source)
    arch = architecture.from_config(folder.config, str(source / "config.json"))
    _check_source(folder, arch)
    flags = arch.megatron_flags(tensor_parallel)
    notes = [" ".join(flags)]
    rounded = sorted(
        {str(e.dtype).removeprefix("torch.") for e in folder.entries.values()} - {"bfloat16"}
    )
    if rounded:
        notes.append(f"rounded to BF16 from {', '.join(rounded)}")
    arguments: dict[str, Any] = arch.megatron_arguments()
    todo = mapping.units(arch)
    counter = meter(sum(folder.entries[n].nbytes for u in todo for n in u.hf), progress)
    with output.folder(target, huggingface.total_bytes(hf_specs(arch))) as partial:
        writer = TorchDistWriter(partial / "release")
        for unit in todo:
            parts = [folder.read(name).to(BF16) for name in unit.hf]
            value = unit.row.layout.join(parts, arch)
            writer.tensor(unit.megatron, value, unit.layer, arch.num_layers)
            counter.add(sum(folder.entries[name].nbytes for name in unit.hf))
        for name in _empty_states(arch):
            writer.empty_object(name)
        writer.finish(arguments)
        for file, text in (
            (FLAGS_FILE, "\n".join(flags) + "\n"),
            ("latest_checkpointed_iteration.txt", "release"),
        ):
            with (partial / file).open("w", encoding="utf-8") as opened:
                opened.write(text)
                sync(opened)
    return Report(target, len(todo), counter.done, counter.seconds, tuple(notes))


def _empty_states(arch: Architecture) -> Iterator[str]:
    """Names TransformerEngine's layers ask for; block scaling keeps nothing in them."""
    for name in mapping.extra_states(arch):
        for layer in range(arch.num_layers):
            yield f"{name}._extra_state/shard_{layer}_{arch.num_layers}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"


def _check_source(folder: Folder, arch: Architecture) -> None:
    if folder.quantization is not None:
        raise UserError(
            f"{folder.path} is quantized ({folder.quantization.get('quant_method')}); dequantize it first: "
            "megatron-fp8 convert fp8-to-hf"
        )
    specs = hf_specs(arch)
    for name, (_, shape) in specs.items():
        entry = folder.entries.get(name)
        if entry is None:
            tie = ""
            if name == "lm_head.weight":
                tie = ": config.json says it is not tied to the embedding; set tie_word_embeddings"
            raise UserError(f"{folder.path} has no {name}{tie}")
        check_shape(name, entry.shape, shape, str(folder.path))
        if entry.dtype not in (BF16, torch.float16, torch.float32):
            dtype = str(entry.dtype).removeprefix("torch.")
            raise UserError(
                f"{folder.path}: {name} is {dtype}; expected bfloat16, float16 or float32"
            )
    extra = sorted(n for n in set(folder.entries) - set(specs) if not _ignorable(n))
    if extra == ["lm_head.weight"] and arch.tied:
        embedding = folder.read("model.embed_tokens.weight")
        if torch.equal(folder.read("lm_head.weight"), embedding):
            return
        raise UserError(
            f"{folder.path}: lm_head.weight differs from the embedding, but config.json ties them; set "
            "tie_word_embeddings to false"
        )
    if extra:
        raise UserError(
            f"{folder.path}: {extra[0]} has no place in a {arch.family} model; a row in "
            "checkpoint/mapping.py would give it one"
        )
