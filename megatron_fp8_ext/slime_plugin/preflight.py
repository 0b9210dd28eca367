"""Checks of a parsed slime command, before Ray starts anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.fp8.reference import BLOCK
from megatron_fp8_ext.recipe import FP8Recipe, ScaleFormat
from megatron_fp8_ext.slime_plugin import weights

UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# Measured (docs/rl.md): power-of-two against FP32 scales, N(0, 0.02), 1024 x 1024.
MIXED_COST = (
    "every code differs and weights are 3.7e-2 of their norm apart (one cast itself costs 2.7e-2)"
)
ALLOW_MIXED = "--allow-mixed-rollout"


def check(args: Any, recipe: FP8Recipe | None, environ: Mapping[str, str]) -> list[str]:
    """Check the command against its recipe and the served checkpoint; returns notes to print.

    Raises:
        UserError: what would fail, or quietly be something else, later.
    """
    refuse_unsafe_loading({**environ, **(getattr(args, "train_env_vars", None) or {})})
    config = read_config(Path(args.hf_checkpoint)) if args.hf_checkpoint else {}
    if not getattr(args, "trust_remote_code", False):
        refuse_remote_code(Path(args.hf_checkpoint) if args.hf_checkpoint else None)
    refuse_open_hosts(args)
    if recipe is None or getattr(args, "debug_train_only", False):
        return []
    allow = bool(getattr(args, "allow_mixed_rollout", False))
    notes = []
    problems = [rollout_numbers(config, recipe)]
    if recipe.is_fp8 and "quantization_config" in config:
        tp = int(getattr(args, "tensor_model_parallel_size", 1) or 1)
        problems.append(block_mismatch(config, tp))
        refuse_engine_tp(config, int(args.rollout_num_gpus_per_engine))
    for problem in filter(None, problems):
        if not allow:
            raise UserError(f"{problem}; or add {ALLOW_MIXED} to run it nevertheless")
        notes.append(f"{ALLOW_MIXED}: {problem}")
    return notes


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a Hugging Face folder.

    Raises:
        UserError: it is not there or not JSON.
    """
    file = folder / "config.json"
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--hf-checkpoint {folder}: cannot read config.json: {error}") from error
    return found


def served_scale_format(quantization: Mapping[str, Any]) -> ScaleFormat:
    """Return the scale format a served checkpoint declares: `scale_fmt: ue8m0`, else FP32 (DeepSeek-V3)."""
    return "power_of_two" if quantization.get("scale_fmt") == "ue8m0" else "float32"


def rollout_numbers(config: Mapping[str, Any], recipe: FP8Recipe) -> str | None:
    """Say how the rollout's numbers would differ from training's; None if they are the same.

    Raises:
        UserError: the served checkpoint is quantized in a way training is not.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        if not recipe.is_fp8:
            return None
        return (
            f"--hf-checkpoint has no quantization_config, so the servers would compute in BF16 what "
            f"--fp8-recipe {recipe.name} trains in FP8 (weights 2.7e-2 of their norm apart); make it with "
            "`megatron-fp8 convert hf-to-fp8`"
        )
    if not recipe.is_fp8:
        return (
            f"--fp8-recipe {recipe.name} trains in BF16 and --hf-checkpoint is served in "
            "FP8 (weights 2.7e-2 of "
            "their norm apart); give the BF16 folder"
        )
    weights.check_config(quantization)
    served = served_scale_format(quantization)
    if served == recipe.scale_format:
        return None
    wanted = "e8m0" if recipe.scale_format == "power_of_two" else "fp32"
    return (
        f"--fp8-recipe {recipe.name} trains with {recipe.scale_format} scales and "
        "--hf-checkpoint is served with "
        f"{served} ones (scale_fmt: {quantization.get('scale_fmt')}): {MIXED_COST}; make it "
        "with `megatron-fp8 "
        f"convert hf-to-fp8 --scale-format {wanted}`, or train with the other recipe"
    )


def _shape(config: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
    """Return (hidden, ffn, heads, key-value heads, head size)."""
    heads = int(config["num_attention_heads"])
    return (
        int(config["hidden_size"]),
        int(config["intermediate_size"]),
        heads,
        int(config.get("num_key_value_heads") or heads),
        int(config.get("head_dim") or int(config["hidden_size"]) // heads),
    )


def block_mismatch(config: Mapping[str, Any], tp: int) -> str | None:
    """Say where training's 128x128 blocks are not the served model's; None where all are.

    Training casts the fused QKV and gate-up matrices of each tensor-parallel rank, the servers have the split
    ones: the blocks agree where every part is a multiple of 128.
    """
    try:
        _, ffn, heads, kv_heads, size = _shape(config)
    except KeyError:
        return None
    parts = {
        "query rows of a group": heads // kv_heads * size,
        "key and value rows of a head": size,
        f"attention columns over {tp} tensor-parallel ranks": heads * size / tp,
        f"FFN rows over {tp} tensor-parallel ranks": ffn / tp,
    }
    bad = [f"{name} ({value:g})" for name, value in parts.items() if value % BLOCK]
    if not bad:
        return None
    return (
        f"training's 128x128 blocks are not the served model's: {', '.join(bad)} no multiple of 128, so "
        "codes and "
        "scales differ (weights 2.9e-2 of their norm apart where blocks are shifted)"
    )


def engine_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Return what SGLang splits over an engine's ranks, each part of which must be whole blocks."""
    hidden, ffn, heads, kv_heads, size = _shape(config)
    del hidden
    return {
        "num_attention_heads x head_dim": heads * size,
        "num_key_value_heads x head_dim": kv_heads * size,
        "intermediate_size": ffn,
    }


def refuse_engine_tp(config: Mapping[str, Any], tp: int) -> None:
    """Check that SGLang can split the FP8 model over `--rollout-num-gpus-per-engine`.

    SGLang replicates key-value heads when there are more ranks than heads.

    Raises:
        UserError: names the dimension and the numbers of ranks that do.
    """
    try:
        sizes = engine_sizes(config)
        _, _, _, kv_heads, size = _shape(config)
    except KeyError:
        return
    for name, total in sizes.items():
        if not _splits(name, total, tp, kv_heads, size):
            good = [
                n
                for n in (1, 2, 4, 8)
                if all(_splits(k, v, n, kv_heads, size) for k, v in sizes.items())
            ]
            raise UserError(
                f"--rollout-num-gpus-per-engine {tp}: {name} = {total} does not split into {tp} "
                "parts of whole "
                f"{BLOCK}-blocks, and SGLang would refuse to start; use "
                f"{' or '.join(map(str, good)) or 'BF16'}"
            )


def _splits(name: str, total: int, tp: int, kv_heads: int, size: int) -> bool:
    if name.startswith("num_key_value"):
        ranks = min(tp, kv_heads)
        return kv_heads % ranks == 0 and (kv_heads // ranks * size) % BLOCK == 0
    return total % (tp * BLOCK) == 0


def refuse_unsafe_loading(environ: Mapping[str, str]) -> None:
    """Refuse the variable that switches torch's safe loading off for every file of the job.

    Raises:
        UserError: it is set.
    """
    if environ.get(UNSAFE, "0").lower() not in ("", "0", "n", "no", "false"):
        raise UserError(
            f"{UNSAFE}={environ[UNSAFE]}: any checkpoint could run code in this job; unset it "
            "(nothing here needs it)"
        )


def refuse_remote_code(folder: Path | None) -> None:
    """Refuse a checkpoint that brings code: slime loads every one with trust_remote_code.

    Raises:
        UserError: a config of it names classes of its own (`auto_map`).
    """
    if folder is None:
        return
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        if isinstance(found, dict) and found.get("auto_map"):
            raise UserError(
                f"{file} has auto_map: slime would run Python code from that folder; read the code and add "
                "--trust-remote-code, or take auto_map out"
            )


def refuse_open_hosts(args: Any) -> None:
    """Refuse servers that listen on every interface: they take weights and prompts from anybody.

    Raises:
        UserError: names the flag.
    """
    for name in ("sglang_host", "sglang_router_ip", "router_host", "prefill_host"):
        if getattr(args, name, None) in ("0.0.0.0", "::"):
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)} listens on every interface "
                "without a password; "
                "give the address of the cluster's own network"
            )
