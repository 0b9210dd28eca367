"""Flags that no parser read. slime HEAD gives the command line to three parsers and each ignores the rest."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import sys
from collections.abc import Iterator
from typing import Any

from megatron_fp8_ext.errors import UserError


class Watch:
    """What each parser of the command line knew, and what it left over."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.left: list[set[str]] = []

    def unknown(self) -> list[str]:
        """Return the flags that every parser left over."""
        return sorted(set.intersection(*self.left)) if self.left else []

    def check(self) -> None:
        """Refuse unknown flags.

        Raises:
            UserError: names the first of them and the nearest known flag.
        """
        unknown = self.unknown()
        if not unknown:
            return
        near = difflib.get_close_matches(unknown[0], self.known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"slime and Megatron know no {unknown[0]}: {hint}slime would drop it without a word"
            + (f"; the same goes for {', '.join(unknown[1:])}" if unknown[1:] else "")
        )


@contextlib.contextmanager
def watch() -> Iterator[Watch]:
    """Within it, record what the parsers of this process's command line leave over."""
    seen = Watch()
    native = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self: Any, args: Any = None, namespace: Any = None) -> Any:
        parsed, rest = native(self, args, namespace)
        # Parsers that read something else (a test's list, a sub-command) are none of ours.
        if args is None or _is_command_line(args):
            seen.known.update(self._option_string_actions)
            seen.left.append({t.partition("=")[0] for t in rest if t.startswith("--")})
        return parsed, rest

    argparse.ArgumentParser.parse_known_args = parse_known_args  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        argparse.ArgumentParser.parse_known_args = native  # type: ignore[method-assign]


def _is_command_line(args: Any) -> bool:
    """Whether `args` are ours, the recipe expanded or not: most of the flags are the same."""
    ours = {t for t in sys.argv[1:] if t.startswith("--")}
    return len(ours & set(args)) * 2 > len(ours)
