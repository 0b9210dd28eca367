"""Sums of a number below 100 and a digit: problems, a tokenizer of characters, and a reward that checks the answer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SYMBOLS = [*"0123456789", "+", "="]
EOS, PAD = "<eos>", "<pad>"
VOCABULARY = {PAD: 0, EOS: 1, **{symbol: i + 2 for i, symbol in enumerate(SYMBOLS)}}
# Padded, so that embedding and head have whole rows for any tensor-parallel size.
VOCAB_SIZE = 128
HELD_OUT = 200


def problems() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return (training, held-out) pairs; always the same split."""
    pairs = [(a, b) for a in range(100) for b in range(10)]
    random.Random(20261125).shuffle(pairs)
    return pairs[HELD_OUT:], pairs[:HELD_OUT]


def question(a: int, b: int) -> str:
    return f"{a}+{b}="


def write(folder: Path) -> tuple[Path, Path]:
    """Write slime's prompt files; returns (training, held-out)."""
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    for file, pairs in zip(files, problems(), strict=True):
        rows = [{"prompt": question(a, b), "label": str(a + b)} for a, b in pairs]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def tokenizer() -> Any:
    """Return a fast tokenizer of single characters, loadable by AutoTokenizer without remote code."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel(VOCABULARY, unk_token=PAD))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, pad_token=PAD)


def encode(text: str) -> list[int]:
    return [VOCABULARY[c] for c in text]


async def reward(args: Any, sample: Any, **_: Any) -> float:
    """1 where the whole answer is the sum, else 0. Value of `--custom-rm-path`."""
    return float(sample.response == sample.label)
