"""Results as JSON, Markdown and a table against the reference's published scores."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_fp8_ext.evaluation import benchmarks
from megatron_fp8_ext.evaluation.compare import Difference
from megatron_fp8_ext.files import write_atomically

_HEAD = ("benchmark", "questions", "avg@k", "pass@k", "cut", "tokens", "InfiR2-FP8 1.5B / 7B")


def rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the cells of the table, one row for each benchmark of results.json."""
    cells: list[tuple[str, ...]] = []
    for name, result in found.items():
        benchmark = benchmarks.get(name)
        passes = " ".join(
            f"@{k} {_with_error(each['value'], each['se'])}"
            for k, each in result["pass_at"].items()
        )
        cells.append(
            (
                benchmark.title,
                str(result["questions"]),
                f"@{result['samples']} {_with_error(result['average'], result['se'])}",
                passes or "-",
                f"{result['truncated']:.1f} %",
                f"{result['tokens']:.0f}",
                " / ".join(f"{score:.2f}" for score in benchmark.published.values()),
            )
        )
    return cells


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.2f}" + ("" if error is None else f" ± {error:.2f}")


def table(found: Mapping[str, Any]) -> Table:
    """Return the table for the terminal."""
    shown = Table(*_HEAD, box=None)
    for row in rows(found):
        shown.add_row(*row)
    return shown


def markdown(everything: Mapping[str, Any]) -> str:
    """Return results.md."""
    found, lines = everything["benchmarks"], [f"# Evaluation of {everything['model']['name']}", ""]
    lines += [f"| {' | '.join(_HEAD)} |", "|" + "---|" * len(_HEAD)]
    lines += [f"| {' | '.join(row)} |" for row in rows(found)]
    lines += [
        "",
        "Percent ± one standard error over questions. With the questions fixed, the standard error of "
        "avg@k is:",
        "",
    ]
    for name, result in found.items():
        error = (
            "none (one sample)" if result["se_answers"] is None else f"{result['se_answers']:.2f}"
        )
        lines.append(f"- {name}: {error}")
    warned = [f"- **{n}**: {text}" for n, r in found.items() for text in r["warnings"]]
    if warned:
        lines += ["", "## Warnings", "", *warned]
    lines += ["", "## Settings", ""]
    for name, result in found.items():
        settings = ", ".join(f"{k} {v}" for k, v in result["settings"].items() if v is not None)
        lines.append(f"- {name}: {settings}; data {result['data']}")
    versions = ", ".join(f"{k} {v}" for k, v in everything["versions"].items())
    lines.append(f"- {versions}; server {everything['server']['kind']}")
    lines += [
        "",
        f"## Differences from the reference's evalscope, {benchmarks.REFERENCE_EVALSCOPE}",
        "",
    ]
    lines += [f"- {name}: {text}" for name in found for text in benchmarks.get(name).differences]
    return "\n".join(lines) + "\n"


def save(folder: Path, everything: Mapping[str, Any]) -> None:
    """Write results.json and results.md."""
    write_atomically(folder / "results.json", json.dumps(everything, indent=1) + "\n")
    write_atomically(folder / "results.md", markdown(everything))


def differences(found: Sequence[Difference]) -> Table:
    """Return the table of a comparison."""
    level = f"{100 * found[0].level:g} % interval"
    shown = Table(
        "benchmark", "questions", "A", "B", "B - A", level, "better/worse/same", "", box=None
    )
    for each in found:
        interval = "-" if math.isnan(each.low) else f"{each.low:+.2f} to {each.high:+.2f}"
        shown.add_row(
            each.benchmark,
            str(each.questions),
            f"{each.a:.2f}",
            f"{each.b:.2f}",
            f"{each.difference:+.2f}",
            interval,
            f"{each.better}/{each.worse}/{each.equal}",
            each.says,
        )
    return shown
