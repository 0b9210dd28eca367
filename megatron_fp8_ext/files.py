"""Write a file so that its name never stands for half of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary name beside `path`; after the block, sync it and rename it to `path`."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, data: str | bytes) -> Path:
    """Write `data` under a temporary name beside `path`, sync it, rename it, and return `path`."""
    with open_atomically(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return path
