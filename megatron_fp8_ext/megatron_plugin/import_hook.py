"""Run code right before or right after a module is first imported.

Megatron has no plugin discovery, and most of its modules take functions from each other by name.
The moment after a module's body ran, and before anyone else can import from it, is the only one in
which replacing a function reaches every user of it. Standard library only: the torch autoload door
runs this at the end of `import torch`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

AfterImport = Callable[[ModuleType], None]


class _Loader(importlib.abc.Loader):
    """The real loader, followed by our callbacks."""

    def __init__(self, loader: Any, callbacks: list[AfterImport]) -> None:
        self._loader, self._callbacks = loader, callbacks

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        result: ModuleType | None = self._loader.create_module(spec)
        return result

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for callback in self._callbacks:
            callback(module)

    def __getattr__(self, name: str) -> Any:  # get_source, get_filename, ... for tracebacks
        return getattr(self._loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself; wraps the loader of the modules that have callbacks."""

    def __init__(self) -> None:
        self.before: dict[str, list[Callable[[], None]]] = {}
        self.after: dict[str, list[AfterImport]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name in self.before:
            for prepare in self.before.pop(name):
                prepare()
        if name not in self.after:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.after[name])
        return spec


_finder = _Finder()


def before_import(module: str, prepare: Callable[[], None]) -> None:
    """Call `prepare` once, just before `module` is imported; at once if it already is."""
    if module in sys.modules:
        prepare()
    else:
        _finder.before.setdefault(module, []).append(prepare)


def after_import(module: str, callback: AfterImport) -> None:
    """Call `callback(module)` just after `module` is imported; at once if it already is."""
    _finder.after.setdefault(module, []).append(callback)
    if module in sys.modules:
        callback(sys.modules[module])


def install() -> None:
    """Set the seam in this process. Idempotent."""
    if _finder in sys.meta_path:
        return
    sys.meta_path.insert(0, _finder)
    before_import("megatron.core", _prepare)
    before_import("megatron.training", _prepare)


_prepared = False


def _prepare() -> None:
    """Register the patches this run needs, now that torch is fully imported."""
    global _prepared
    if _prepared:
        return
    _prepared = True
    from megatron_fp8_ext.megatron_plugin import patches

    patches.register()
