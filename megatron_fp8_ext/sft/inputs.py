"""Input files in pieces that workers read on their own: JSONL byte ranges, parquet row groups."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.sft.conversation import InvalidRecord

_SMALLEST, _LARGEST, _PIECES = 2**20, 2**26, 256
_BLOCK = 2**22
HALF_PAIR = "its text holds half of a surrogate pair, which no encoding has"


@dataclass(frozen=True)
class Piece:
    """A part of an input file.

    Attributes:
        path: the file.
        start: first byte (JSONL) or row group (parquet).
        end: one past the last.
        first_line: number of its first line or row, from 1.
        size: bytes, for progress.
    """

    path: str
    start: int
    end: int
    first_line: int
    size: int


def piece_bytes(total: int) -> int:
    """Return the size of the pieces of `total` bytes: enough to share out, none too large for memory."""
    return min(max(total // _PIECES, _SMALLEST), _LARGEST)


def check(path: Path) -> None:
    """Check that a file is one that can be read.

    Raises:
        UserError: missing, a directory, empty, or of an unknown kind.
    """
    if path.is_dir():
        raise UserError(f"{path} is a directory; give the files in it")
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.suffix not in (".parquet", ".jsonl", ".json", ".ndjson"):
        raise UserError(f"{path}: only .jsonl and .parquet files are read, not '{path.suffix}'")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: it needs one JSON object a line, or parquet rows")


def pieces(path: Path, piece_bytes: int = _LARGEST) -> Iterator[Piece]:
    """Yield the pieces of a file, which does not depend on how many workers read them.

    Raises:
        UserError: see `check`; or unreadable parquet.
    """
    check(path)
    size = path.stat().st_size
    if path.suffix == ".parquet":
        yield from _row_groups(path)
        return
    start = at = 0
    line = first = 1
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            newline = block.find(b"\n", max(start + piece_bytes - at, 0))
            while newline >= 0 and at + newline + 1 < size:
                end = at + newline + 1
                line = first + _count(path, start, end)
                yield Piece(str(path), start, end, first, end - start)
                start, first = end, line
                newline = block.find(b"\n", max(start + piece_bytes - at, 0))
            at += len(block)
    if start < size:
        yield Piece(str(path), start, size, first, size - start)


def _count(path: Path, start: int, end: int) -> int:
    lines = 0
    with path.open("rb") as file:
        file.seek(start)
        while start < end and (block := file.read(min(_BLOCK, end - start))):
            lines += block.count(b"\n")
            start += len(block)
    return lines


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f'{path} needs the package pyarrow: pip install "megatron-fp8-ext[data]"'
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's errors have no common base of their own
        raise UserError(f"{path} is not a readable parquet file: {error}") from error


def _row_groups(path: Path) -> Iterator[Piece]:
    metadata = _parquet(path).metadata
    row = 1
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group)
        yield Piece(str(path), group, group + 1, row, int(rows.total_byte_size))
        row += rows.num_rows


def records(piece: Piece) -> Iterator[tuple[int, Any]]:
    """Yield (line number, record or InvalidRecord) of a piece."""
    path = Path(piece.path)
    if path.suffix == ".parquet":
        line = piece.first_line
        for batch in _parquet(path).iter_batches(row_groups=[piece.start], batch_size=256):
            for row in batch.to_pylist():
                yield line, row
                line += 1
        return
    with path.open("rb") as file:
        file.seek(piece.start)
        line, at = piece.first_line, piece.start
        while at < piece.end:
            raw = file.readline()
            at += len(raw)
            if raw.strip():
                yield line, _decode(raw)
            line += 1


def _decode(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return InvalidRecord(f"broken UTF-8 at byte {error.start} of the line ({error.reason})")
    except (ValueError, RecursionError) as error:
        return InvalidRecord(f"not valid JSON ({error})")
