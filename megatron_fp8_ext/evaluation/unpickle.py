"""Read LiveCodeBench's pickled strings without running what a pickle may carry (no imports of ours)."""

from __future__ import annotations

import io
import pickle
from typing import Any


class _StringsOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} has no place in test cases")


def loads(data: bytes) -> Any:
    """Return what a pickle of plain values holds.

    Raises:
        pickle.UnpicklingError: it names a class or function.
    """
    return _StringsOnly(io.BytesIO(data)).load()
