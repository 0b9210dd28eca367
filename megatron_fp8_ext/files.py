"""Write a file so that its name never stands for half of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """Open a temporary file beside `path`; at the end sync it and rename it, after an error delete it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> Path:
    """Write `text` as `writing` does, and return `path`."""
    with writing(path) as file:
        file.write(text)
    return path
