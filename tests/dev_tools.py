"""Commands of the `dev` extra that tests call."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest


def tool(name: str) -> str:
    """Path of a command; skips the test where it is not installed."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f'needs {name}: pip install -e ".[dev]"')
    return found
