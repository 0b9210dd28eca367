"""Plain text to the `.bin` / `.idx` pair that Megatron's GPTDataset reads, by Megatron's own writer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.sft import inputs
from megatron_fp8_ext.sft.conversation import InvalidRecord


@dataclass(frozen=True)
class CorpusStatistics:
    """What was written: documents, tokens (end-of-document tokens included) and bytes read."""

    documents: int
    tokens: int
    bytes_read: int


def documents_in(path: Path, key: str = "text") -> Iterator[str]:
    """Yield the documents of a JSONL or parquet file, a line or row each, its text under `key`.

    Raises:
        UserError: missing or empty file; a line without such a text, with its number.
    """
    for piece in inputs.pieces(path):
        for number, record in inputs.records(piece):
            text = record.get(key) if isinstance(record, dict) else None
            if isinstance(record, InvalidRecord):
                reason = str(record)
            elif not isinstance(text, str):
                reason = f'no string under "{key}"'
            elif not _has_encoding(text):
                reason = inputs.HALF_PAIR
            else:
                yield text
                continue
            raise UserError(f"{path}, line {number}: {reason}; mend or delete the line")


def _has_encoding(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_indexed(
    documents: Iterable[str],
    tokenizer_path: str,
    prefix: Path,
    progress: Callable[[int], None] | None = None,
) -> CorpusStatistics:
    """Tokenize documents and write `PREFIX.bin` and `PREFIX.idx`.

    Both are written under temporary names, synced and renamed, so that a half-written corpus never
    carries the final name.

    Args:
        documents: texts; each becomes one document, closed by the end-of-document token.
        tokenizer_path: see `megatron_fp8_ext.tokenizer.load`.
        prefix: path without suffix, as `--data-path` takes it.
        progress: called with the number of characters of each document.

    Raises:
        UserError: no documents, or no Megatron to write them.
    """
    from megatron_fp8_ext import tokenizer as tokenizers

    tokenizer, end = tokenizers.load(tokenizer_path)
    try:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    except ImportError as error:
        raise UserError(
            f'writing Megatron data needs Megatron itself ({error}): pip install "megatron-core"'
        ) from error
    import torch

    prefix.parent.mkdir(parents=True, exist_ok=True)
    suffixes = (".bin", ".idx")
    partial = {s: prefix.with_name(f"{prefix.name}.{os.getpid()}.partial{s}") for s in suffixes}
    dtype = DType.optimal_dtype(tokenizer.get_vocab_size())
    count = tokens = size = 0
    try:
        builder = IndexedDatasetBuilder(str(partial[".bin"]), dtype=dtype)
        for text in documents:
            ids = [*tokenizer.encode(text, add_special_tokens=False).ids, end]
            builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
            count, tokens, size = count + 1, tokens + len(ids), size + len(text)
            if progress is not None:
                progress(len(text))
        if count == 0:
            raise UserError(f"nothing to write to {prefix}: the input holds no document")
        builder.finalize(str(partial[".idx"]))
        for suffix in suffixes:
            with partial[suffix].open("rb") as written:
                os.fsync(written.fileno())
        for suffix in suffixes:
            partial[suffix].replace(prefix.with_name(prefix.name + suffix))
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return CorpusStatistics(documents=count, tokens=tokens, bytes_read=size)
