"""A command line as Megatron reads it: `--flag`, `--flag value`, `--flag=value`, last one wins.

Megatron's parser is made with `allow_abbrev=False`, so a flag is always written in full.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def has(argv: Sequence[str], flag: str) -> bool:
    """Whether `flag` is written."""
    return any(token == flag or token.startswith(flag + "=") for token in argv)


def value(argv: Sequence[str], flag: str) -> str | None:
    """Return the last value written for `flag`, or None."""
    found = None
    for index, token in enumerate(argv):
        if token.startswith(flag + "="):
            found = token[len(flag) + 1 :]
        elif token == flag and index + 1 < len(argv) and not argv[index + 1].startswith("--"):
            found = argv[index + 1]
    return found


def without(argv: Sequence[str], flag: str, takes_value: bool) -> list[str]:
    """Return `argv` with every occurrence of `flag` taken out."""
    kept: list[str] = []
    skip = False
    for token in argv:
        if skip:
            skip = False
            if not token.startswith("--"):
                continue
        if token == flag:
            skip = takes_value
            continue
        if token.startswith(flag + "="):
            continue
        kept.append(token)
    return kept


def first_written(argv: Sequence[str], flags: Iterable[str]) -> str | None:
    """Return the first of `flags` that is written, or None."""
    return next((flag for flag in flags if has(argv, flag)), None)
