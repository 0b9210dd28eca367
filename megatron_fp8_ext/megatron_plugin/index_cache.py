"""Megatron's cache of data indexes, written in place: what a killed run left torn must not be read.

Megatron takes an index for whole if its files exist. One that was cut short makes every later start fail
until somebody deletes it by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy
from numpy.lib import format as npy


def drop_torn(folders: Iterable[Path]) -> list[Path]:
    """Delete index files (`*_index.npy`) that are shorter than their header says; return them."""
    torn = [
        path for folder in folders for path in sorted(folder.glob("*_index.npy")) if _is_torn(path)
    ]
    for path in torn:
        path.unlink(missing_ok=True)
    return torn


def _is_torn(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(file)
            needed = file.tell() + math.prod(shape) * numpy.dtype(dtype).itemsize
    except (ValueError, EOFError):
        return True
    except FileNotFoundError:
        return False
    return path.stat().st_size < needed
