"""Read runs, write the report beside them, and print its first table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_fp8_ext.proof import page, record, result, tables
from megatron_fp8_ext.proof.result import Result

# What a terminal of 80 columns holds; the page has the rest.
_SHOWN = ("recipe", "verdict", "gap", "95 % interval", "why")


def write(folders: Sequence[Path], output: Path, console: Console) -> Result:
    """Write report.html, report.md and report.json into `output` and return their figures.

    Raises:
        UserError: runs that must not be compared, no BF16 among them, or a missing package.
    """
    page.require()
    found = result.build(record.read_all(folders))
    output.mkdir(parents=True, exist_ok=True)
    html = page.write_html(found, output / "report.html")
    page.write_markdown(found, output / "report.md")
    result.write_json(found, output / "report.json")
    rows = tables.verdicts(found)
    shown = Table(*_SHOWN, box=None)
    for row in rows.rows:
        shown.add_row(*(row[rows.head.index(name)] for name in _SHOWN))
    console.print(shown)
    console.print(found.control_note, soft_wrap=True)
    console.print(f"page: {html} (report.md and report.json beside it)", soft_wrap=True)
    return found
