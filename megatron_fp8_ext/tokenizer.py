"""Load a tokenizer from local files: a Hugging Face folder or tokenizer.json, or a GGUF model file.

Nothing is downloaded. Needs the extra `data` (packages tokenizers, gguf).
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fp8_ext.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTROL = 3  # token type of special tokens, GGUF specification


def load(path: str | Path) -> tuple[Tokenizer, int]:
    """Return the tokenizer and the id of its end-of-document token.

    Args:
        path: a folder with tokenizer.json, such a file, or a .gguf file with a byte-level BPE.

    Raises:
        UserError: nothing there, an unreadable file, or no end-of-document token.
    """
    source = Path(path)
    file = source / "tokenizer.json" if source.is_dir() else source
    if not file.is_file():
        raise UserError(
            f"--tokenizer {path}: no {file.name} there; give a folder with tokenizer.json, or a .gguf"
        )
    try:
        tokenizer = _from_gguf(file) if file.suffix == ".gguf" else _from_json(file)
    except ImportError as error:
        raise UserError(
            f"--tokenizer {path} needs the package {error.name}: pip install "
            '"megatron-fp8-ext[data]"'
        ) from error
    for name in ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"):
        end: int | None = tokenizer.token_to_id(name)
        if end is not None:
            return tokenizer, end
    raise UserError(f"--tokenizer {path}: no end-of-document token such as <|endoftext|> in it")


def _from_json(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises its own bare Exception
        raise UserError(f"--tokenizer {file}: not a tokenizer.json: {error}") from error


def _from_gguf(file: Path) -> Tokenizer:
    """Rebuild a GPT-2 style byte-level BPE from the vocabulary and merges in a GGUF file."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    fields = _gguf_fields(file)
    kind = _text(fields, "tokenizer.ggml.model")
    split = _text(fields, "tokenizer.ggml.pre")
    pre_tokenizer: Any
    if kind == "gpt2" and split == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        pre_tokenizer = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif kind == "gpt2" and split == "qwen2":
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        raise UserError(
            f"--tokenizer {file}: its tokenizer is {kind}/{split}; only byte-level BPE of the kinds "
            "smollm and qwen2 is rebuilt from GGUF; give the model's tokenizer.json"
        )
    tokens = _texts(fields, "tokenizer.ggml.tokens")
    pairs = (line.partition(" ") for line in _texts(fields, "tokenizer.ggml.merges"))
    merges = [(left, right) for left, _, right in pairs]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [
        token
        for token, index in zip(tokens, types.data, strict=True)
        if int(types.parts[index][0]) == _CONTROL
    ]
    tokenizer.add_special_tokens(special)
    return tokenizer


@functools.lru_cache(maxsize=1)
def _gguf_fields(file: Path) -> dict[str, Any]:
    """Return the key-value fields; reading them takes seconds."""
    import gguf

    fields: dict[str, Any] = gguf.GGUFReader(file).fields
    return fields


def _texts(fields: Any, key: str) -> list[str]:
    field = fields[key]
    return [bytes(field.parts[index]).decode("utf-8") for index in field.data]


def _text(fields: Any, key: str) -> str:
    return _texts(fields, key)[0] if key in fields else "unknown"


def gguf_chat_template(file: Path) -> tuple[str | None, dict[str, str]]:
    """Return (chat template or None, special tokens by the names templates use) of a GGUF file."""
    fields = _gguf_fields(file)
    key = "tokenizer.chat_template"
    source = _text(fields, key) if key in fields else None
    special: dict[str, str] = {}
    for name in ("bos", "eos"):
        field = fields.get(f"tokenizer.ggml.{name}_token_id")
        if field is not None:
            index = int(field.parts[field.data[0]][0])
            tokens = fields["tokenizer.ggml.tokens"]
            special[f"{name}_token"] = bytes(tokens.parts[tokens.data[index]]).decode("utf-8")
    return source, special


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return a digest of everything that decides its tokens."""
    settings = json.loads(tokenizer.to_str())
    # Neither cuts nor pads what we encode, and offsets alone depend on the post-processor.
    for name in ("truncation", "padding", "post_processor"):
        settings.pop(name, None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
