"""Pictures as SVG files, drawn by matplotlib, which is asked for only when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.files import write_atomically

# Read as well by colour-blind readers, and on white and on black.
COLOURS = ("#888888", "#d1495b", "#2e86ab", "#66a182", "#edae49", "#8d5a97")


def require(what: str) -> None:
    """Raise UserError if matplotlib is missing; `what` needs it."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            f'{what} needs matplotlib ({error}): pip install "megatron-fp8-ext[report]"'
        ) from error
    matplotlib.use("svg")


def panels(width: float, height: float, shares: Sequence[float] = (1,)) -> tuple[Any, list[Any]]:
    """Return a figure of `width` x `height` inches and its panels, one above the other.

    Args:
        width: of the figure.
        height: of the figure.
        shares: height of each panel, relative to the others.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(len(shares), 1, height_ratios=shares, squeeze=False)
    found = [row[0] for row in axes]
    for panel in found:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, found


def learning_rates(figure: Any, panel: Any) -> None:
    """Finish a panel of learning rates: its axis, and the figure's legend above everything."""
    panel.set_ylabel("learning rate")
    panel.set_ylim(bottom=0)
    panel.set_xlim(left=0)
    panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize="small")


def write_svg(path: Path, figure: Any) -> None:
    """Write a figure; the same figure makes the same file.

    Raises:
        UserError: a place that cannot be written.
    """
    import matplotlib

    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "picture"}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"picture {path} cannot be written: {error.strerror or error}") from error
