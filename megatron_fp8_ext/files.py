"""Write a file so that its name never stands for half of it; read one that must hold a JSON object."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from megatron_fp8_ext.errors import UserError


def write_atomically(path: Path, text: str) -> Path:
    """Write `text` under a temporary name beside `path`, sync it, rename it, and return `path`."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            sync(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
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
