"""The model of a run: its config.json, its architecture flags, and how it differs from the released one.

Two of the reference's defects were copied numbers: a rotary base of 10000 for Qwen2.5-1.5B, and a
vocabulary size that Megatron pads differently for each tensor-parallel size. The table of flags is
`checkpoint/architecture.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fp8_ext.checkpoint.architecture import FAMILIES, from_config
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.files import read_json


def read_config(folder: str) -> dict[str, Any]:
    """Return config.json of a model folder.

    Raises:
        UserError: no such folder, no config.json in it, or it is damaged.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--model {folder}: no such folder; give a model in Hugging Face format")
    return read_json(Path(folder) / "config.json", "give --model a folder in Hugging Face format")


def flags(config: Mapping[str, Any], tensor_parallel: int) -> dict[str, str]:
    """Return Megatron's architecture flags, by name without dashes; `true` is a switch.

    Raises:
        UserError: a model type that is not known here, or a field that is missing or that Megatron's
            flags cannot express.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"config.json: model_type '{kind}' is none of {', '.join(sorted(FAMILIES))}; give its "
            "architecture flags after -- and leave --model out"
        )
    return from_config(config, "config.json").flags(tensor_parallel)


def differences(config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Return where a config.json differs from the facts of the released model, one phrase each."""
    found = []
    for key, expected in facts.items():
        nested = config.get("rope_parameters") or {}  # where transformers 5 keeps the rotary base
        actual = config.get(key, nested.get(key))
        if actual is not None and _norm(actual) != _norm(expected):
            found.append(f"{key} {_norm(actual)} (not {_norm(expected)})")
    return found


def _norm(value: Any) -> str:
    text = str(value).lower()
    try:
        return f"{float(text):g}" if float(text) < 1e5 else str(int(float(text)))
    except ValueError:
        return text
