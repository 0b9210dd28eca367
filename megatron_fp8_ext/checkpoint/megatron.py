"""Megatron checkpoint <-> Hugging Face folder, bit for bit and tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_fp8_ext.checkpoint import architecture, huggingface, mapping, output
from megatron_fp8_ext.checkpoint.architecture import Architecture
from megatron_fp8_ext.checkpoint.huggingface import Folder
from megatron_fp8_ext.checkpoint.mapping import check_shape
from megatron_fp8_ext.checkpoint.report import Progress, Report, meter
from megatron_fp8_ext.checkpoint.torch_dist import open_checkpoint
from megatron_fp8_ext.checkpoint.torch_dist_writer import TorchDistWriter
from megatron_fp8_ext.checkpoint.weights import BF16, MegatronWeights
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.files import sync

FLAGS_FILE = "megatron_flags.txt"


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
