"""The report's pictures: SVG in the page's own text colour, readable at the width of a phone."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib.figure import Figure

from megatron_fp8_ext.proof import verdict
from megatron_fp8_ext.proof.plan import BASELINE
from megatron_fp8_ext.proof.record import Run
from megatron_fp8_ext.proof.result import RecipeResult, Result, layer_errors

# Told apart by colour-blind readers, on white and on black (Okabe and Ito's, without black and yellow).
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_GREY = "#8a8a8a"
_POINTS = 400  # of a curve: as many as a screen shows
_WIDTH = 5.0  # inches at 10 points: a phone shows it at about its own size


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        title: heading above it.
        caption: what it shows, in a sentence.
        svg: the drawing.
    """

    title: str
    caption: str
    svg: str


def draw(result: Result) -> list[Picture]:
    """Return the pictures that the runs have data for."""
    colours = _colours(result.recipes)
    makers: Sequence[Callable[[Result, Mapping[str, str]], Picture | None]] = (
        _loss, _gap_curve, _gap_intervals, _sqnr, _underflow, _grad_norm, _learning_rate, _time,
    )  # fmt: skip
    return [picture for make in makers if (picture := make(result, colours)) is not None]


def _colours(recipes: Sequence[RecipeResult]) -> dict[str, str]:
    others = [recipe.recipe for recipe in recipes if recipe.recipe != BASELINE]
    found = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(others)}
    return {BASELINE: _GREY, **found}


def _smooth(series: Mapping[int, float], width: int) -> dict[int, float]:
    """Trailing mean over `width` values, thinned to at most _POINTS."""
    numbers = sorted(series)
    values = [series[number] for number in numbers]
    step = max(len(numbers) // _POINTS, 1)
    return {
        numbers[i]: statistics.fmean(values[max(i - width + 1, 0) : i + 1])
        for i in range(len(numbers) - 1, -1, -step)
    }


def _width(result: Result) -> int:
    return max(result.steps // 50, 1)


def _loss(result: Result, colours: Mapping[str, str]) -> Picture | None:
    figure, axes = _axes("LM loss")
    width = _width(result)
    drawn = False
    for recipe in result.recipes:
        curves = [_smooth(r.run.losses, width) for r in recipe.runs if r.run.losses]
        if not curves:
            continue
        drawn = True
        colour = colours[recipe.recipe]
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))
        style = "--" if recipe.control else "-"
        if recipe.recipe == BASELINE and len(curves) > 1:
            low = [min(curve[n] for curve in curves) for n in shared]
            high = [max(curve[n] for curve in curves) for n in shared]
            axes.fill_between(shared, low, high, color=colour, alpha=0.3, linewidth=0)
        means = [statistics.fmean(curve[n] for curve in curves) for n in shared]
        axes.plot(shared, means, style, label=recipe.recipe, color=colour, linewidth=1.2)
        for run in recipe.runs:
            if run.run.status != "finished" and run.run.losses:
                last = max(run.run.losses)
                axes.plot([last], [run.run.losses[last]], "x", color=colour, markersize=8)
    if not drawn:
        return None
    _legend(axes)
    band = "; the band is BF16 from seed to seed" if len(result.seeds) > 1 else ""
    note = f"Mean over seeds, trailing mean of {width} iterations{band}. A cross: a run that ended early."
    return Picture("Loss", note, _svg(figure))


def _paired(run: Run, base: Run) -> dict[int, float]:
    shared = sorted(set(run.losses) & set(base.losses))
    return {n: 100 * (run.losses[n] - base.losses[n]) / base.losses[n] for n in shared}


def _gap_curve(result: Result, colours: Mapping[str, str]) -> Picture | None:
    base = {r.run.seed: r.run for r in result.recipes[0].runs}
    figure, axes = _axes("gap to BF16, %")
    width = max(result.steps // 20, 1)
    drawn = False
    for recipe in result.recipes[1:]:
        labelled = False
        for run in recipe.runs:
            other = base.get(run.run.seed)
            series = _paired(run.run, other) if other is not None else {}
            if not series:
                continue
            curve = _smooth(series, width)
            numbers = sorted(curve)
            axes.plot(
                numbers,
                [curve[n] for n in numbers],
                "--" if recipe.control else "-",
                color=colours[recipe.recipe],
                linewidth=1.0,
                label=None if labelled else recipe.recipe,
            )
            labelled = drawn = True
    if not drawn:
        return None
    _margin_line(axes.axhline)
    axes.set_yscale("symlog", linthresh=1.0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _legend(axes)
    note = (
        f"One line a seed: same weights at the start, same batches; trailing mean of {width} iterations. "
        "Dotted: the margin. Beyond ±1 % the axis is logarithmic."
    )
    return Picture("Paired gap over the run", note, _svg(figure))


def _margin_line(draw: Callable[..., Any]) -> None:
    draw(100 * verdict.MARGIN, color="#d94040", linestyle=":", linewidth=1.2)
    draw(0, color=_GREY, linewidth=0.8)


def _gap_intervals(result: Result, colours: Mapping[str, str]) -> Picture | None:
    shown = [r for r in result.recipes[1:] if r.gap is not None]
    if not shown:
        return None
    figure, axes = _axes("", height=0.9 + 0.4 * len(shown))
    for row, recipe in enumerate(reversed(shown)):
        gap = recipe.gap
        assert gap is not None
        colour = colours[recipe.recipe]
        if gap.count > 1:
            axes.plot([100 * gap.low, 100 * gap.high], [row, row], color=colour, linewidth=2)
        axes.plot([100 * gap.mean], [row], "o", color=colour)
        own = [100 * r.gap for r in recipe.runs if r.gap is not None]
        axes.plot(own, [row] * len(own), "|", color=colour, markersize=10)
    _margin_line(axes.axvline)
    axes.set_yticks(range(len(shown)), [r.recipe for r in reversed(shown)])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xscale("symlog", linthresh=1.0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("gap to BF16, %")
    note = (
        "Point: mean over seeds; bar: 95 % interval; ticks: single seeds; dotted: the margin of "
        f"{verdict.MARGIN:.2%}. Beyond ±1 % the axis is logarithmic."
    )
    return Picture("Final gap and its interval", note, _svg(figure))


_OPERANDS = {"input rows": "input", "weight": "weight", "grad rows": "gradient"}
_MARKS = {"input rows": "o", "weight": "s", "grad rows": "^"}


def _per_layer(
    result: Result,
    colours: Mapping[str, str],
    name: str,
    label: str,
    factor: float,
) -> Any:
    figure, axes = _axes(label, height=3.9)
    drawn = False
    for recipe in result.recipes[1:]:
        errors = layer_errors(recipe)
        for operand, kind in _OPERANDS.items():
            by_layer: dict[int, list[float]] = {}
            for place, values in errors.get(operand, []):
                value = values[name]
                if value is not None:
                    by_layer.setdefault(int(place.split()[0]), []).append(factor * value)
            if not by_layer:
                continue
            drawn = True
            numbers = sorted(by_layer)
            axes.plot(
                numbers,
                [statistics.fmean(by_layer[n]) for n in numbers],
                marker=_MARKS[operand],
                markersize=4,
                linewidth=1,
                linestyle="--" if recipe.control else "-",
                color=colours[recipe.recipe],
                label=f"{recipe.recipe}, {kind}",
            )
    if not drawn:
        return None
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(axes, columns=2)
    return figure


def _sqnr(result: Result, colours: Mapping[str, str]) -> Picture | None:
    figure = _per_layer(result, colours, "sqnr_db", "SQNR, dB", 1.0)
    if figure is None:
        return None
    note = "Signal to quantization noise of each operand's cast, mean over a layer's linears and all samples."
    return Picture("Quantization error by layer", note, _svg(figure))


def _underflow(result: Result, colours: Mapping[str, str]) -> Picture | None:
    figure = _per_layer(result, colours, "underflow", "underflow, %", 100.0)
    if figure is None:
        return None
    return Picture(
        "Underflow by layer", "Values other than zero that the cast made zero.", _svg(figure)
    )


def _grad_norm(result: Result, colours: Mapping[str, str]) -> Picture | None:
    return _simple(
        result, colours, "Gradient norm", "gradient norm", "Global, before clipping.", "grad_norm"
    )


def _learning_rate(result: Result, colours: Mapping[str, str]) -> Picture | None:
    return _simple(result, colours, "Learning rate", "learning rate", "", "learning_rate")


def _time(result: Result, colours: Mapping[str, str]) -> Picture | None:
    return _simple(
        result,
        colours,
        "Step time",
        "ms / iteration",
        "Emulated FP8 is slow by nature.",
        "milliseconds",
    )


def _simple(
    result: Result, colours: Mapping[str, str], title: str, label: str, note: str, field: str
) -> Picture | None:
    """One line a recipe: the first seed's."""
    figure, axes = _axes(label)
    drawn = False
    for recipe in result.recipes:
        run = next((r.run for r in recipe.runs if r.run.iterations), None)
        if run is None:
            continue
        series = {i.number: getattr(i, field) for i in run.iterations.values() if i.number > 2}
        curve = _smooth({n: v for n, v in series.items() if v is not None}, _width(result))
        if not curve:
            continue
        numbers = sorted(curve)
        style = "--" if recipe.control else "-"
        axes.plot(
            numbers,
            [curve[n] for n in numbers],
            style,
            label=recipe.recipe,
            color=colours[recipe.recipe],
            linewidth=1.1,
        )
        drawn = True
    if not drawn:
        return None
    _legend(axes)
    axes.set_ylim(bottom=0)
    return Picture(title, f"The first seed of each recipe. {note}".strip(), _svg(figure))


def _legend(axes: Any, columns: int = 3) -> None:
    """Below the axes, where it hides no line."""
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(
        handles, labels, frameon=False, fontsize=9, ncols=columns, loc="outside lower center"
    )


def _axes(label: str, height: float = 3.1) -> tuple[Any, Any]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("iteration")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    """Return the figure as SVG that takes the page's text colour, light or dark."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "proof"}):
        # All of it: matplotlib's own metadata names hosts, and the page names none.
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("#000000", "currentColor").replace(
        '<g id="text_', '<g fill="currentColor" id="text_'
    )
