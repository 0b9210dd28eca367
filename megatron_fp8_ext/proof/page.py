"""The report as one HTML file that needs no network and no script, and as Markdown."""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.files import write_atomically
from megatron_fp8_ext.proof import tables
from megatron_fp8_ext.proof.result import Result
from megatron_fp8_ext.proof.tables import Table

_MARKS = ("lossless", "not lossless", "inconclusive", "crashed", "interrupted", "not started")


def require() -> None:
    """Check that the page can be drawn: before training, not after it.

    Raises:
        UserError: jinja2 or matplotlib is missing.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'the report needs the package {error.name}: pip install "megatron-fp8-ext[report]"'
        ) from error
    del jinja2


def write_html(result: Result, path: Path) -> Path:
    """Write the page and return its path."""
    require()
    import jinja2

    from megatron_fp8_ext.proof import figures

    source = resources.files("megatron_fp8_ext.proof").joinpath("page.html.jinja").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    html = environment.from_string(source).render(
        title=result.headline,
        control_note=result.control_note,
        verdicts=tables.verdicts(result),
        rule=tables.RULE,
        spread=tables.spread(result),
        sharing=tables.sharing(result),
        pictures=figures.draw(result),
        members=tables.members(result),
        errors=tables.errors(result),
        errors_note=tables.errors_note(result),
        scores=tables.scores(result),
        layers=tables.layers(result),
        facts=tables.facts(result),
        commands=_commands(result),
        marks=_MARKS,
    )
    return write_atomically(path, html)


def write_markdown(result: Result, path: Path) -> Path:
    """Write the same without pictures and single layers."""
    parts = [f"# {result.headline}", result.control_note, _markdown(tables.verdicts(result))]
    parts += [tables.RULE, tables.spread(result), tables.sharing(result)]
    parts += ["## Runs", _markdown(tables.members(result))]
    if tables.errors(result).rows:
        parts += ["## Error of the casts", tables.errors_note(result)]
        parts.append(_markdown(tables.errors(result)))
    if tables.scores(result).rows:
        parts += ["## Scores after training", _markdown(tables.scores(result))]
    parts += ["## What was compared", _markdown(tables.facts(result)), "## Commands"]
    parts += [f"{name}:\n\n```\n{command}\n```" for name, command in _commands(result)]
    return write_atomically(path, "\n\n".join(part for part in parts if part) + "\n")


def _commands(result: Result) -> list[tuple[str, str]]:
    """The first seed's command of each recipe; of its program the name, for its place is one machine's."""
    runs = [recipe.runs[0].run for recipe in result.recipes]
    words = [(Path(run.described["argv"][0]).name, *run.described["argv"][1:]) for run in runs]
    return [(run.folder.name, shlex.join(argv)) for run, argv in zip(runs, words, strict=True)]


def _markdown(table: Table) -> str:
    lines = [table.head, tuple("---" for _ in table.head), *table.rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )
