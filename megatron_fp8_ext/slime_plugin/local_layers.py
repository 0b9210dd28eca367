"""Names of Megatron's local layers for slime, which knows TransformerEngine's.

Under `--fp8-emulate` the model has Megatron's local layers, whose norms are modules of their own; in
TransformerEngine's layers they are part of the linear layer that follows. Loading a Hugging Face checkpoint
and the weight push go through these names.
"""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any

_FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_LAYER = re.compile(
    r"(.*\bdecoder\.layers\.\d+\.)(input_layernorm\.weight|pre_mlp_layernorm\.weight)"
)
_MARK = "_megatron_fp8_ext"
_TO_HF = "slime.backends.megatron_utils.megatron_to_hf"
_FROM_HF = "slime.backends.megatron_utils.hf_to_megatron"


def fused_name(name: str) -> str:
    """Return TransformerEngine's name of a dense layer's norm, any other name unchanged."""
    found = _LAYER.fullmatch(name)
    return f"{found[1]}{_FUSED[found[2]]}" if found else name


def install() -> list[str]:
    """Rename in slime's converters, both ways; returns the names of the replaced symbols.

    slime before v0.3 has no loader of its own; there only the push is renamed.
    """
    to_hf = importlib.import_module(_TO_HF)
    done = []
    for name in ("convert_qwen2_to_hf", "convert_llama_to_hf"):
        if hasattr(to_hf, name):
            setattr(to_hf, name, _renamed(getattr(to_hf, name), 1))
            done.append(f"megatron_to_hf.{name}")
    try:
        loaders = importlib.import_module(_FROM_HF)._LOADERS
    except (ModuleNotFoundError, AttributeError):
        return done
    for family in ("qwen2", "qwen3", "llama"):
        if family in loaders:
            loaders[family] = _renamed(loaders[family], 0)
    return [*done, "hf_to_megatron._LOADERS"]


def _renamed(function: Any, place: int) -> Any:
    """Wrap `function` so that the Megatron name at argument `place` is TransformerEngine's."""
    if hasattr(function, _MARK):
        return function

    @functools.wraps(function)
    def wrapper(*arguments: Any) -> Any:
        words = list(arguments)
        words[place] = fused_name(words[place])
        return function(*words)

    setattr(wrapper, _MARK, True)
    return wrapper
