"""Read a YAML file of settings: scalars stay text, a key stands once, errors name the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_fp8_ext.errors import UserError


class _Loader(yaml.BaseLoader):  # type: ignore[misc]  # PyYAML ships no types
    """PyYAML's loader that keeps every scalar as text; a key written twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"'{key.value}' stands twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        UserError: the file is missing, is not YAML, or is no mapping; with its line.
    """
    try:
        with path.open(encoding="utf-8") as file:
            data = yaml.load(file, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}{line}: {error.problem or error}; mend that line") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a mapping; write lines such as `nodes: 2`")
    return data


def mapping(data: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    """Return the mapping under `key`, empty where there is none.

    Raises:
        UserError: something else stands there.
    """
    found = data.get(key, {})
    if found == "":
        return {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: {key}: must hold `name: value` lines, not {found!r}")
    return found
