"""Read runs, write the report beside them, and print its first table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_fp8_ext.proof import page, record, result, tables
from megatron_fp8_ext.proof.result import Result


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
    show(tables.verdicts(found), console)
    console.print(found.control_note, soft_wrap=True)
    console.print(f"page: {html} (report.md and report.json beside it)", soft_wrap=True)
    return found


# The columns that fit beside one another in 80; the rest follows in sentences, and is on the page.
_SHOWN = {
    "recipe": "recipe", "verdict": "verdict", "final loss": "final\nloss", "gap": "gap",
    "95 % interval": "95 % interval", "time / BF16": "time\n/ BF16",
}  # fmt: skip


def show(rows: tables.Table, console: Console) -> None:
    """Print the verdicts on a terminal of 80 columns or more, uncut."""
    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name, title in _SHOWN.items():
        shown.add_column(title, no_wrap=name != "recipe", vertical="bottom")
    found = [dict(zip(rows.head, row, strict=True)) for row in rows.rows]
    for row in found:
        name = row["recipe"].replace(" (", "\n(")
        shown.add_row(name, *(row[column] for column in _SHOWN if column != "recipe"))
    console.print(shown)
    for row in found:
        console.print(
            f"{row['recipe']}: {row['runs finished']} runs finished, {row['FP8 GEMMs per iteration']} FP8 "
            f"GEMMs an iteration{f'; {why}' if (why := row['why']) else ''}",
            soft_wrap=True,
        )
