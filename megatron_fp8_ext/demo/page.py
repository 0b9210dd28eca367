"""The demo's page: one HTML file that needs no network and no script."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import matplotlib

matplotlib.use("svg")
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from megatron_fp8_ext.demo.run import Result

# Read as well by colour-blind readers, and on white and on black.
COLOURS = {"bf16": "#888888", "infir2": "#d1495b"}


def write(path: Path, results: Sequence[Result]) -> Path:
    """Write the page for the given runs (the first is the baseline) and return its path."""
    source = resources.files("megatron_fp8_ext.demo").joinpath("page.html.jinja").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    base = results[0].final_loss
    html = environment.from_string(source).render(
        results=results,
        gaps=[(result.final_loss - base) / base for result in results],
        loss_svg=_loss(results),
        rate_svg=_rate(results),
        commands=[result.log.read_text().splitlines()[0] for result in results],
    )
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(html)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path


def _loss(results: Sequence[Result]) -> str:
    figure, axes = _axes("LM loss", height=3.4)
    for result in results:
        points = [(i.number, i.loss) for i in result.iterations if i.loss is not None]
        x, y = zip(*points, strict=True)
        axes.plot(x, y, label=result.recipe, color=COLOURS.get(result.recipe), linewidth=1.2)
    axes.legend(frameon=False)
    return _svg(figure)


def _rate(results: Sequence[Result]) -> str:
    figure, axes = _axes("learning rate", height=1.8)
    first = results[0].iterations
    axes.plot([i.number for i in first], [i.learning_rate for i in first], color="#2e86ab")
    return _svg(figure)


def _axes(label: str, height: float) -> tuple[Any, Any]:
    figure = Figure(figsize=(8, height), layout="tight")
    axes = figure.subplots()
    axes.set_xlabel("iteration")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    """Return the figure as SVG that takes the page's text colour, light or dark."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "demo"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("#000000", "currentColor").replace(
        '<g id="text_', '<g fill="currentColor" id="text_'
    )
