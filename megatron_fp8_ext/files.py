"""Write a file so that its name never stands for half of it; read one that must hold a JSON object."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from megatron_fp8_ext.errors import UserError


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary name beside `path`; after the block, sync it and rename it to `path`."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            sync(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, data: str | bytes) -> Path:
    """Write `data` under a temporary name beside `path`, sync it, rename it, and return `path`."""
    with open_atomically(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return path


def sync(file: IO[Any]) -> None:
    """Flush a file and wait until the disk has it."""
    file.flush()
    os.fsync(file.fileno())


def read_json(path: Path, mend: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        mend: what to do where it is missing or damaged.

    Raises:
        UserError: missing, or not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; {mend}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; {mend}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; {mend}")
    return value
