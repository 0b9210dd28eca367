"""What an evaluation must know of a checkpoint folder before a server loads it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp8_ext.errors import UserError

_SAMPLED = 64
_CHUNK = 1 << 16
_PROMPT_TOKENS = 512  # room for a question; AIME's longest has about 300


@dataclass(frozen=True)
class Model:
    """A Hugging Face checkpoint folder.

    Attributes:
        folder: where it is.
        identity: hash of the small files and of 64 stretches of each weight file, so that a resumed
            evaluation never mixes two checkpoints.
        context: longest sequence by its config; None where it does not say.
        quantization: `quantization_config` of config.json; empty for BF16.
        special: texts of its special tokens.
        sampling: what generation_config.json says about sampling that our requests leave out.
    """

    folder: Path
    identity: str
    context: int | None
    quantization: dict[str, Any]
    special: tuple[str, ...]
    sampling: dict[str, Any]


def read(folder: Path) -> Model:
    """Read a checkpoint folder.

    Raises:
        UserError: not such a folder.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"--model {folder}: no config.json there; give a Hugging Face folder (megatron-fp8 convert "
            "makes one)"
        )
    try:
        config = json.loads(file.read_text())
        context = config.get("max_position_embeddings")
        quantization = dict(config.get("quantization_config") or {})
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{file}: not a model's configuration: {error}") from error
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"--model {folder}: no *.safetensors there")
    return Model(
        folder=folder,
        identity=_identity(folder, weights),
        context=int(context) if context else None,
        quantization=quantization,
        special=_special_tokens(folder),
        sampling=_sampling(folder),
    )


def check_context(model: Model, name: str, max_tokens: int) -> None:
    """Raise a UserError where question and answer cannot fit into the model's context."""
    if model.context is not None and max_tokens + _PROMPT_TOKENS > model.context:
        raise UserError(
            f"{name}: --max-tokens {max_tokens} and a question do not fit into the context of "
            f"{model.context} tokens ({model.folder}/config.json): --max-tokens "
            f"{max(model.context - _PROMPT_TOKENS, 1)} or less"
        )


def check_prompts(model: Model, name: str, prompts: Sequence[Sequence[dict[str, str]]]) -> None:
    """Raise a UserError where a message holds a special token: it would be templated twice.

    The server applies the chat template to the messages; text that already carries its tags, as the
    reference's scripts send, would give the model a conversation inside a conversation.
    """
    for number, prompt in enumerate(prompts, 1):
        for message in prompt:
            found = next((token for token in model.special if token in message["content"]), None)
            if found:
                raise UserError(
                    f"{name}, question {number}: the {message['role']} message holds the special "
                    f"token {found}, so the chat template would apply twice: remove it from the data "
                    "or from --system-prompt"
                )


def _identity(folder: Path, weights: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".txt", ".model") and file.is_file():
            digest.update(file.name.encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    for file in weights:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as data:
            for part in range(_SAMPLED):
                data.seek(max(size - _CHUNK, 0) * part // (_SAMPLED - 1))
                digest.update(data.read(_CHUNK))
    return digest.hexdigest()


def _sampling(folder: Path) -> dict[str, Any]:
    neutral = {"top_k": (0, -1), "min_p": (0,), "repetition_penalty": (1,)}
    try:
        given = json.loads((folder / "generation_config.json").read_text())
        said = {name: given.get(name) for name in neutral}
    except (OSError, ValueError, AttributeError):
        return {}
    return {k: v for k, v in said.items() if v is not None and v not in neutral[k]}


def _special_tokens(folder: Path) -> tuple[str, ...]:
    try:
        added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        found = [token["content"] for token in added if token.get("special")]
    except (OSError, ValueError, KeyError, TypeError):
        found = []
    found += ["<|im_start|>", "<|im_end|>"]
    # Only unmistakable ones: a special token such as "0" or a blank may stand in any question.
    return tuple(dict.fromkeys(x for x in found if re.fullmatch(r"<\|.+\|>", x)))
