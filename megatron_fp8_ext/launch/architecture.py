"""Architecture flags from a model's config.json, never from a copied shell file.

Two of the reference's defects were copied numbers: a rotary base of 10000 for Qwen2.5-1.5B, and a
vocabulary size that Megatron pads differently for each tensor-parallel size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fp8_ext.errors import UserError

# How a model type differs from a plain pre-norm SwiGLU transformer with rotary positions.
_TRAITS: dict[str, dict[str, bool]] = {
    "qwen2": {"qkv_bias": True},
    "llama": {},
    "mistral": {},
    "qwen3": {"qk_norm": True},
}


def read_config(folder: str) -> dict[str, Any]:
    """Return config.json of a model folder.

    Raises:
        UserError: no such folder, no config.json in it, or it is damaged.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UserError(f"--model {folder}: no such folder; give a model in Hugging Face format")
    if not path.is_file():
        raise UserError(
            f"--model {folder}: holds no config.json; give a model in Hugging Face format"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; copy the model again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a JSON object; copy the model again")
    return data


def rope_theta(config: Mapping[str, Any]) -> float:
    """Return the rotary base; transformers 5 moved it into `rope_parameters`."""
    nested = config.get("rope_parameters") or {}
    return float(config.get("rope_theta") or nested.get("rope_theta") or 10000.0)


def padded_vocabulary(size: int, tensor_parallel: int) -> int:
    """Return the rows of the embedding: `size`, padded only as far as tensor parallelism needs."""
    return math.ceil(size / tensor_parallel) * tensor_parallel


def flags(config: Mapping[str, Any], tensor_parallel: int) -> dict[str, str]:
    """Return Megatron's architecture flags, by name without dashes; `true` is a switch.

    Raises:
        UserError: a model type that is not known here, or a field that is missing.
    """
    kind = str(config.get("model_type", "none"))
    if kind not in _TRAITS:
        raise UserError(
            f"config.json: model_type '{kind}' is none of {', '.join(sorted(_TRAITS))}; give its "
            "architecture flags after -- and leave --model out"
        )
    traits = _TRAITS[kind]
    heads, hidden = _int(config, "num_attention_heads"), _int(config, "hidden_size")
    groups = _int(config, "num_key_value_heads", heads)
    out = {
        "num-layers": str(_int(config, "num_hidden_layers")),
        "hidden-size": str(hidden),
        "ffn-hidden-size": str(_int(config, "intermediate_size")),
        "num-attention-heads": str(heads),
    }
    if groups != heads:
        out |= {"group-query-attention": "true", "num-query-groups": str(groups)}
    head_dim = _int(config, "head_dim", hidden // heads)
    if head_dim * heads != hidden:
        out["kv-channels"] = str(head_dim)
    out |= {
        "disable-bias-linear": "true",
        "add-qkv-bias": str(traits.get("qkv_bias", False)).lower(),
        "qk-layernorm": str(traits.get("qk_norm", False)).lower(),
        "normalization": "RMSNorm",
        "norm-epsilon": str(config.get("rms_norm_eps", 1e-6)),
        "swiglu": "true",
        "position-embedding-type": "rope",
        "rotary-percent": "1.0",
        "rotary-base": str(int(rope_theta(config))),
        "untie-embeddings-and-output-weights": str(
            not _bool(config, "tie_word_embeddings")
        ).lower(),
        "padded-vocab-size": str(padded_vocabulary(_int(config, "vocab_size"), tensor_parallel)),
    }
    return out


def differences(config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Return where a config.json differs from the facts of the released model, one phrase each."""
    found = []
    for key, expected in facts.items():
        actual = rope_theta(config) if key == "rope_theta" else config.get(key)
        if actual is not None and _norm(actual) != _norm(expected):
            found.append(f"{key} {_norm(actual)} (not {_norm(expected)})")
    return found


def _norm(value: Any) -> str:
    text = str(value).lower()
    try:
        return f"{float(text):g}" if float(text) < 1e5 else str(int(float(text)))
    except ValueError:
        return text


def _bool(config: Mapping[str, Any], key: str) -> bool:
    return str(config.get(key, False)).lower() == "true"


def _int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    try:
        number = int(str(value))
    except ValueError:
        raise UserError(f"config.json: {key} is {value!r}, not a whole number; mend it") from None
    if number <= 0:
        raise UserError(f"config.json: {key} is {number}; it must be positive")
    return number
