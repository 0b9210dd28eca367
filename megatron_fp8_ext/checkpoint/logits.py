"""What two checkpoints of one model answer: logits on a prompt, through transformers on the CPU.

Each is loaded whole in BF16 (FP8 dequantized), one after the other. Needs the extra `convert`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp8_ext.checkpoint import compare as comparison
from megatron_fp8_ext.errors import UserError


@dataclass(frozen=True)
class LogitsComparison:
    """How far the logits of B are from A's.

    Attributes:
        tokens: length of the prompt.
        max_error: largest absolute difference of a logit.
        mean_kl: mean of KL(A || B) over positions, nats.
        same_choice: share of positions with the same most likely token.
    """

    tokens: int
    max_error: float
    mean_kl: float
    same_choice: float

    def summary(self) -> list[str]:
        """Return one line for people."""
        return [
            f"logits on {self.tokens} tokens: largest difference {self.max_error:.3g}, mean KL "
            f"{self.mean_kl:.3g}, same most likely token at {self.same_choice:.1%} of positions"
        ]


def compare(a: Path, b: Path, prompt: str, hf_reference: Path | None = None) -> LogitsComparison:
    """Run both checkpoints on a prompt.

    Raises:
        UserError: no config.json or tokenizer.json in any of the folders; a package is missing.
    """
    ids = _tokens(prompt, (a, b, hf_reference))
    first, second = (_logits(path, ids, (hf_reference, a, b)) for path in (a, b))
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return LogitsComparison(
        tokens=ids.shape[1],
        max_error=(first - second).abs().max().item(),
        mean_kl=(p.exp() * (p - q)).sum(-1).mean().item(),
        same_choice=(first.argmax(-1) == second.argmax(-1)).double().mean().item(),
    )


def load_model(path: Path, configs: tuple[Path | None, ...]) -> Any:
    """Return a transformers model, BF16 on the CPU, with the weights of a checkpoint of any format.

    Raises:
        UserError: no config.json; a package is missing; the checkpoint cannot be read.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise UserError(
            f'logits need the package {error.name}: pip install "megatron-fp8-ext[convert]"'
        ) from error
    settings, where = comparison.find_config((path, *configs))
    if settings is None:
        raise UserError("logits need a config.json: give --hf-reference")
    settings = {k: v for k, v in settings.items() if k not in ("quantization_config", "auto_map")}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    values = comparison.open_values(path, {**settings, "model_type": config.model_type}, where)
    state = {name: values.read(name).to(torch.bfloat16) for name in values.shapes}
    missing = model.load_state_dict(state, strict=False).unexpected_keys
    if missing:
        raise UserError(f"{path}: transformers' {config.model_type} has no {missing[0]}")
    _restore_buffers(model, config)
    model.tie_weights()
    return model.eval()


def _restore_buffers(model: Any, config: Any) -> None:
    """RoPE's frequencies are computed, not stored: take them from a module built on the CPU."""
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config)


def _logits(path: Path, ids: Tensor, configs: tuple[Path | None, ...]) -> Tensor:
    with torch.no_grad():
        out: Tensor = load_model(path, configs)(ids).logits[0].to(torch.float32)
    return out


def _tokens(prompt: str, folders: tuple[Path | None, ...]) -> Tensor:
    from tokenizers import Tokenizer

    for folder in folders:
        if folder is not None and (folder / "tokenizer.json").is_file():
            ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prompt).ids
            if not ids:
                raise UserError("--prompt is empty")
            return torch.tensor([ids])
    raise UserError("logits need a tokenizer.json: give --hf-reference")
