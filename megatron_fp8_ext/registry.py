"""Look up recipes, schedules, losses and packers by name, through entry points.

Our own built-ins are registered in pyproject.toml exactly as a stranger's package registers
theirs, so both are found, listed and overridden on equal terms. Standard library only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from megatron_fp8_ext.errors import UserError, unknown_name

GROUPS: dict[str, str] = {
    "recipe": "megatron_fp8_ext.fp8_recipes",
    "schedule": "megatron_fp8_ext.lr_schedules",
    "loss": "megatron_fp8_ext.losses",
    "packer": "megatron_fp8_ext.packers",
}


@dataclass(frozen=True)
class Provider:
    """One registered name: where it comes from and how to load it."""

    kind: str
    name: str
    target: str
    distribution: str
    entry_point: metadata.EntryPoint

    def load(self) -> Any:
        """Import the object behind the name.

        Raises:
            UserError: the package that provides it cannot be imported.
        """
        try:
            return self.entry_point.load()
        except Exception as error:  # a stranger's import may fail in any way
            raise UserError(
                f"{self.kind} '{self.name}' of package '{self.distribution}' cannot be loaded "
                f"({self.target}): {error}"
            ) from error


@functools.cache
def providers(kind: str) -> tuple[Provider, ...]:
    """Return everything registered for `kind` (a key of GROUPS), sorted by name.

    Raises:
        UserError: two packages register one name: neither may win silently.
    """
    found: dict[str, Provider] = {}
    for point in metadata.entry_points(group=GROUPS[kind]):
        distribution = point.dist.name if point.dist is not None else "unknown"
        entry = Provider(kind, point.name, point.value, distribution, point)
        other = found.get(point.name)
        if other is not None and (other.target, other.distribution) != (point.value, distribution):
            raise UserError(
                f"{kind} '{point.name}' is registered twice, by '{other.distribution}' and by "
                f"'{distribution}': uninstall one of them"
            )
        found[point.name] = entry
    return tuple(found[name] for name in sorted(found))


def names(kind: str) -> tuple[str, ...]:
    """Return the registered names of `kind`."""
    return tuple(provider.name for provider in providers(kind))


def lookup(kind: str, name: str) -> Any:
    """Return the object registered as `name`.

    Raises:
        UserError: unknown name (with the nearest known one), or its package does not import.
    """
    for provider in providers(kind):
        if provider.name == name:
            return provider.load()
    raise unknown_name(kind, name, names(kind))
