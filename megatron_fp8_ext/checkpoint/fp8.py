"""Hugging Face BF16 folder -> block-scaled E4M3 folder for serving, and back.

The format is DeepSeek-V3's, which transformers, SGLang and vLLM read: beside each `weight` (E4M3, `[N, K]`)
a `weight_scale_inv` (FP32, `[ceil(N / 128), ceil(K / 128)]`), the factor that dequantizes; and in
config.json a `quantization_config`. The cast is `fp8/reference.py`, training's own; on a GPU the Triton
kernel that equals it bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_fp8_ext.checkpoint import architecture, huggingface, mapping, output
from megatron_fp8_ext.checkpoint.architecture import BLOCK, Architecture
from megatron_fp8_ext.checkpoint.huggingface import Folder
from megatron_fp8_ext.checkpoint.report import Progress, Report, meter
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.fp8 import reference
from megatron_fp8_ext.kernels import support
from megatron_fp8_ext.recipe import ScaleFormat

SCALE = "_scale_inv"  # after the weight's name
# Values cast at a time. On the CPU it bounds the FP32 copies, of which the reference makes several; a GPU
# is slow at small ones.
SLAB_VALUES = 1 << 21
_GPU_SLAB_VALUES = 1 << 26
Device = Literal["auto", "cpu", "cuda"]
# [N, K] bfloat16 -> codes, scales. Any other cast must agree with the reference bit for bit.
Cast = Callable[[Tensor, ScaleFormat], reference.Quantized]

_FORMATS: dict[str, tuple[ScaleFormat, str]] = {
    "e8m0": ("power_of_two", "ue8m0"),
    "fp32": ("float32", "float"),
}


def quantization_config(scale_format: str, not_converted: list[str]) -> dict[str, Any]:
    """Return config.json's `quantization_config`.

    Args:
        scale_format: `e8m0` or `fp32`.
        not_converted: modules that stay BF16, by full path. Written under both names readers use:
            transformers and SGLang read `modules_to_not_convert`, vLLM `ignored_layers`.
    """
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "scale_fmt": _FORMATS[scale_format][1],
        "modules_to_not_convert": not_converted,
        "ignored_layers": not_converted,
    }


def hf_to_fp8(
    source: Path,
    target: Path,
    *,
    scale_format: str = "e8m0",
    device: Device = "auto",
    cast: Cast | None = None,
    tensor_parallel: int = 1,
    shard_bytes: int = huggingface.SHARD_BYTES,
    progress: Progress | None = None,
) -> Report:
    """Cast the linear weights that training computes in FP8; everything else stays as it is.

    Args:
        source: folder of a BF16 model (FP32 and FP16 weights are rounded to BF16 first, as in training).
        target: must not exist.
        scale_format: `e8m0`, powers of two in FP32 containers (`infir2`), or `fp32` (`infir2-rl`).
        device: where to cast; `auto` takes the GPU if there is one. The codes are the same.
        cast: the cast; `choose_cast` without it.
        tensor_parallel: of the training run, to say whether blocks were the same.
        shard_bytes: largest shard of the output.
        progress: see `report.Progress`.

    Raises:
        UserError: missing, damaged or foreign files; already quantized; weights that are not finite.
    """
    if scale_format not in _FORMATS:
        raise UserError(f"--scale-format {scale_format}: choose e8m0 or fp32")
    folder = huggingface.open_folder(source)
    arch = architecture.from_config(folder.config, str(source / "config.json"))
    if folder.quantization is not None:
        raise UserError(
            f"{source} is quantized already ({folder.quantization.get('quant_method')})"
        )
    weights = _weights(folder, arch)
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, entry in folder.entries.items():
        specs[name] = (entry.dtype, entry.shape)
        if name in weights:
            specs[name] = (torch.float8_e4m3fn, entry.shape)
            specs[name + SCALE] = (torch.float32, scale_shape(entry.shape))
    kept = sorted(
        {name.rpartition(".")[0] for name in folder.entries if name.endswith(".weight")}
        - {name.rpartition(".")[0] for name in weights}
        | {"lm_head"}  # tied models have the module without a tensor
    )
    where = _device(device)
    chosen, by = choose_cast(where) if cast is None else (cast, "the given cast")
    counter = meter(sum(e.nbytes for e in folder.entries.values()), progress)
    with output.folder(target, huggingface.total_bytes(specs)) as partial:
        writer = huggingface.FolderWriter(partial, specs, shard_bytes)
        for name, entry in folder.entries.items():
            value = folder.read(name)
            if name in weights:
                quantized = cast_weight(value, _FORMATS[scale_format][0], where, chosen, name)
                writer.write(name, quantized.codes)
                writer.write(name + SCALE, quantized.scale_inv)
            else:
                writer.write(name, value)
            counter.add(entry.nbytes)
        config = {**folder.config, "quantization_config": quantization_config(scale_format, kept)}
        writer.finish(config, copy_from=source)
    notes = [f"{len(weights)} weights in FP8, cast on {where} by {by}; BF16: {_summary(kept)}"]
    notes += _reader_notes(folder, arch, weights)
    notes += [
        f"blocks differ from those training with TP={tensor_parallel} casts: {reason}"
        for reason in arch.block_mismatches(tensor_parallel)
    ]
    return Report(target, len(specs), counter.done, counter.seconds, tuple(notes))


def choose_cast(device: torch.device) -> tuple[Cast, str]:
    """Return the fastest cast that can run on a device, and what does it; all give the same bits."""
    if device.type != "cuda":
        return reference.quantize_weight, "torch"
    gap = support.gap(device)
    if gap is not None:
        return reference.quantize_weight, f"torch ({gap})"
    return triton_cast, "Triton"


def triton_cast(weight: Tensor, scale_format: ScaleFormat) -> reference.Quantized:
    """Cast a BF16 weight `[N, K]` with the training kernel, for fprop's operand alone."""
    from megatron_fp8_ext.kernels.cast import cast_128x128  # imports triton

    return cast_128x128(weight.contiguous(), scale_format, columns=False).quantized()


def cast_weight(
    value: Tensor, scale_format: ScaleFormat, device: torch.device, cast: Cast, name: str
) -> reference.Quantized:
    """Round a weight to BF16 as training does, cast it, and return it to the CPU.

    Raises:
        UserError: NaN or infinity in it.
    """
    codes = torch.empty(value.shape, dtype=torch.float8_e4m3fn)
    scales = []
    values = SLAB_VALUES if device.type == "cpu" else _GPU_SLAB_VALUES
    for rows in slabs(tuple(value.shape), values):
        slab = value[rows].to(device).to(torch.bfloat16)
        if not bool(torch.isfinite(slab).all()):
            raise UserError(
                f"{name} holds NaN or infinity: the model is broken, and FP8 would hide it"
            )
        quantized = cast(slab, scale_format)
        codes[rows] = quantized.codes.cpu()
        scales.append(quantized.scale_inv.cpu())
    return reference.Quantized(codes, torch.cat(scales), (BLOCK, BLOCK))


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the grid of 128x128 blocks over a weight."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def _weights(folder: Folder, arch: Architecture) -> set[str]:
    shapes = {n: s for u in mapping.units(arch) for n, s in zip(u.hf, u.hf_shapes, strict=True)}
    for name, shape in shapes.items():
        if name not in folder.entries:
            raise UserError(f"{folder.path} has no {name}, which its config.json needs")
        mapping.check_shape(name, folder.entries[name].shape, shape, str(folder.path))
    found = set(mapping.fp8_weights(arch))
    for name in found:
        dtype = folder.entries[name].dtype
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise UserError(
                f"{folder.path}: {name} is {str(dtype).removeprefix('torch.')}; expected bfloat16, "
                "float16 or float32"
            )
    return found


def _reader_notes(folder: Folder, arch: Architecture, weights: set[str]) -> list[str]:
    """Say which servers cannot read the result, by the rules in their loaders."""
    notes = []
    partial = sorted(n for n in weights if any(size % BLOCK for size in folder.entries[n].shape))
    if partial:
        shape = "x".join(map(str, folder.entries[partial[0]].shape))
        notes.append(
            f"{len(partial)} weights have partial blocks, such as {partial[0]} {shape}: transformers cannot "
            "read this file (it takes the block size from the shapes); use fp8-to-hf for it"
        )
    merged = {
        "q, k and v": (arch.num_attention_heads * arch.kv_channels, arch.num_query_groups * arch.kv_channels),
        "gate and up": (arch.ffn_hidden_size,),
    }  # fmt: skip
    for what, rows in merged.items():
        odd = [size for size in rows if size % BLOCK]
        if odd:
            notes.append(
                f"SGLang and vLLM merge {what} and refuse parts of {odd[0]} rows, no multiple of {BLOCK}"
            )
    return notes


def _summary(modules: list[str]) -> str:
    """Collapse the numbered modules of a list: `model.layers.*.input_layernorm (28)`."""
    counts: dict[str, int] = {}
    for name in modules:
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        counts[pattern] = counts.get(pattern, 0) + 1
    return ", ".join(f"{p} ({n})" if "*" in p else p for p, n in counts.items())


def _device(device: Device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; use --device cpu")
    return torch.device(device)


def is_block_fp8(folder: Folder) -> bool:
    """Whether a folder is in this format.

    Raises:
        UserError: it is quantized in another one.
    """
    found = folder.quantization
    if found is None:
        return False
    if found.get("quant_method") != "fp8" or found.get("weight_block_size") != [BLOCK, BLOCK]:
        raise UserError(
            f"{folder.path}: quantization {found.get('quant_method')} with blocks "
            f"{found.get('weight_block_size')} is not supported; only fp8 with [128, 128]"
        )
    return True


def read_dequantized(folder: Folder, name: str, rows: slice | None = None) -> Tensor:
    """Return a tensor; FP8 weights dequantized to BF16 (exact where scales are powers of two).

    Args:
        folder: an FP8 folder, or a plain one.
        name: of the tensor.
        rows: a range of its first axis that begins at a multiple of 128; all of it without.

    Raises:
        UserError: an FP8 weight without scales, or with scales of another shape or dtype.
    """
    entry = folder.entries[name]
    if entry.dtype != torch.float8_e4m3fn:
        return folder.read(name, rows)
    scales = folder.entries.get(name + SCALE)
    if scales is None:
        raise UserError(f"{folder.path}: {name} is FP8 and has no {name}{SCALE}")
    if scales.dtype != torch.float32 or scales.shape != scale_shape(entry.shape):
        raise UserError(
            f"{folder.path}: {name}{SCALE} is {scales.dtype} {list(scales.shape)}, expected float32 "
            f"{list(scale_shape(entry.shape))}"
        )
    first, last = (0, entry.shape[0]) if rows is None else (rows.start, rows.stop)
    out = torch.empty((last - first, entry.shape[1]), dtype=torch.bfloat16)
    for slab in slabs((last - first, entry.shape[1])):
        part = slice(first + slab.start, first + slab.stop)
        blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
        codes, scale_inv = folder.read(name, part), folder.read(scales.name, blocks)
        quantized = reference.Quantized(codes, scale_inv, (BLOCK, BLOCK))
        out[slab] = quantized.dequantize(torch.bfloat16)
    return out


def slabs(shape: tuple[int, ...], values: int = SLAB_VALUES) -> Iterator[slice]:
    """Yield slices of rows, whole blocks each, so that slab by slab is the same as all at once."""
    step = max(values // (BLOCK * max(math.prod(shape[1:]), 1)), 1) * BLOCK
    for first in range(0, shape[0], step):
        yield slice(first, min(first + step, shape[0]))


def fp8_to_hf(
    source: Path,
    target: Path,
    *,
    shard_bytes: int = huggingface.SHARD_BYTES,
    progress: Progress | None = None,
) -> Report:
    """Dequantize a block-scaled FP8 folder to BF16, partial blocks included.

    Raises:
        UserError: missing, damaged or foreign files; not in this format.
    """
    folder = huggingface.open_folder(source)
    if not is_block_fp8(folder):
        raise UserError(f"{source} is not quantized: its config.json has no quantization_config")
    names = [name for name in folder.entries if not _is_scale(folder, name)]
    specs = {name: (folder.entries[name].dtype, folder.entries[name].shape) for name in names}
    for name, (dtype, shape) in specs.items():
        if dtype == torch.float8_e4m3fn:
            specs[name] = (torch.bfloat16, shape)
    counter = meter(sum(e.nbytes for e in folder.entries.values()), progress)
    with output.folder(target, huggingface.total_bytes(specs)) as partial:
        writer = huggingface.FolderWriter(partial, specs, shard_bytes)
        for name in names:
            writer.write(name, read_dequantized(folder, name))
            scales = folder.entries.get(name + SCALE)
            counter.add(folder.entries[name].nbytes + (scales.nbytes if scales else 0))
        config = {k: v for k, v in folder.config.items() if k != "quantization_config"}
        writer.finish(config, copy_from=source)
    return Report(target, len(specs), counter.done, counter.seconds)


def _is_scale(folder: Folder, name: str) -> bool:
    return name.endswith(SCALE) and name.removesuffix(SCALE) in folder.entries


def fp8_share(folder: Folder, arch: Architecture) -> float:
    """Return the share of a model's linear weights (by values) that are stored in FP8."""
    names = mapping.fp8_weights(arch)
    sizes = {name: math.prod(folder.entries[name].shape) for name in names}
    stored = sum(
        size for name, size in sizes.items() if folder.entries[name].dtype == torch.float8_e4m3fn
    )
    return stored / sum(sizes.values())
