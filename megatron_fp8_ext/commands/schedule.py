"""`megatron-fp8 schedule ...`: a learning rate schedule before any GPU is used."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_fp8_ext import schedule_plan
from megatron_fp8_ext.errors import UserError, unknown_name
from megatron_fp8_ext.megatron_plugin import branch_folder, schedule_flags
from megatron_fp8_ext.megatron_plugin.branch import Branch, enough_data
from megatron_fp8_ext.schedule import STYLES, WSD, Batch, DecayStyle
from megatron_fp8_ext.schedule_plan import Curve, Scale

app = typer.Typer(help="Plan learning rate schedules.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Plan learning rate schedules."""


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def plan(
    context: typer.Context,
    branch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ITERATION:LENGTH[:STYLE]",
            help="a decay branch of the run: where it begins, and how many iterations (or which part "
            "of its whole run, such as 10%) it decays; may be given several times",
        ),
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="draw the curves into this file")] = None,
) -> None:
    """Print phases and learning rates of the training FLAGS, and draw the curve.

    FLAGS are the training command's: --lr-schedule wsd --wsd-warmup-iters ...,
    or --wsd-decay-from CHECKPOINT --wsd-decay-iters N. What does not concern
    the schedule is ignored, so that a whole command can be pasted.
    """
    argv = [token for token in context.args if token != "--"]
    curves, scale, notes = _curves(argv, branch or [])
    console = Console(width=max(Console().width, 120))
    console.print(_table(curves, scale))
    for line in (*schedule_plan.draw(curves, scale), *_legend(curves), *notes):
        print(line)
    if svg is not None:
        schedule_plan.write_svg(svg, curves, scale)
        print(f"picture: {svg}")


def _curves(argv: Sequence[str], specs: Sequence[str]) -> tuple[list[Curve], Scale, list[str]]:
    located = branch_folder.locate(argv, needs_save=False)
    scheduled = schedule_flags.expand(argv, None if located is None else located.point)
    if scheduled.branch is not None:
        if specs:
            raise UserError(
                "--branch contradicts --wsd-decay-from: both say where to branch; drop one"
            )
        return _from_checkpoint(scheduled.branch)
    phases, style = scheduled.phases, scheduled.style
    if phases is None:
        phases, style = schedule_flags.native_phases(argv)
    batch = schedule_flags.batch_of(argv)
    factor = batch.samples or 1 if phases.base == "iters" else 1
    lr, min_lr = (schedule_flags.number(argv, flag) for flag in ("--lr", "--min-lr"))
    if lr is None:
        raise UserError("--lr is missing: the plan needs the stable learning rate")
    if lr <= 0 or (min_lr or 0) < 0:
        raise UserError("--lr is a positive number, and --min-lr not a negative one: change it")
    init = schedule_flags.number(argv, "--lr-warmup-init")
    stable = WSD(
        lr=float(lr),
        min_lr=float(min_lr or 0),
        warmup_samples=phases.warmup * factor,
        total_samples=phases.total * factor,
        decay_samples=phases.decay * factor,
        decay_style=style,
        init_lr=float(init or 0),
    )
    if stable.min_lr > stable.lr:
        raise UserError(f"--min-lr {stable.min_lr:g} is above --lr {stable.lr:g}")
    in_samples = phases.base == "samples" or batch.samples is not None
    scale = Scale("samples" if in_samples else "iters", batch)
    name = "run" if stable.decay_samples else "stable run"
    curves = [Curve(name, stable, 0, stable.total_samples)]
    curves += [_branch(spec, stable, scale) for spec in specs]
    return curves, scale, []


def _branch(spec: str, stable: WSD, scale: Scale) -> Curve:
    """Return the branch that one `--branch` describes."""
    parts = spec.split(":")
    if len(parts) not in (2, 3) or not parts[0].isdigit():
        raise UserError(f"--branch {spec}: write ITERATION:LENGTH or ITERATION:LENGTH:STYLE")
    start, text = int(parts[0]), parts[1]
    style: DecayStyle | None = None
    if len(parts) == 3:
        style = next((known for known in STYLES if known == parts[2]), None)
        if style is None:
            raise unknown_name("--branch STYLE", parts[2], STYLES)
    try:
        amount = Fraction(text.removesuffix("%"))
    except ValueError as error:
        raise UserError(f"--branch {spec}: {text} is neither a number nor a percentage") from error
    if text.endswith("%"):
        amount /= 100
        if not 0 < amount < 1:
            raise UserError(f"--branch {spec}: the decay is a part of its whole run, below 100%")
        amount = Fraction(round(start * amount / (1 - amount)))
    if amount.denominator != 1 or amount < 1:
        raise UserError(f"--branch {spec}: the decay has no whole number of iterations")
    size = 1 if scale.base == "iters" else scale.batch.samples
    if size is None:
        raise UserError(f"--branch {spec} counts in iterations: add --global-batch-size")
    made = schedule_plan.branch(stable, start, int(amount), style, size)
    return Curve(f"branch {spec}", made, start * size, made.total_samples)


def _from_checkpoint(made: Branch) -> tuple[list[Curve], Scale, list[str]]:
    point = made.point
    enough_data(made, point.available_samples)
    wsd, here = made.schedule, point.scheduler_samples
    stable = WSD(
        lr=point.lr,
        min_lr=point.min_lr,
        warmup_samples=wsd.warmup_samples,
        total_samples=here,
        decay_samples=0,
    )
    jump = point.lr if made.lr != point.lr else None
    curves = [
        Curve("stable run", stable, 0, here),
        Curve(f"branch at {point.iteration}", wsd, here, wsd.total_samples, jump),
    ]
    known = point.available_samples
    lasts = (
        f"and lasts for {known}"
        if known is not None
        else "how long it lasts shows when it is built"
    )
    data = f"data: sized as the stable run's, for {point.planned_samples} samples, {lasts}"
    return curves, Scale("samples", Batch(point.global_batch_size, point.seq_length)), [data]


def _table(curves: Sequence[Curve], scale: Scale) -> Table:
    units = ("iterations", "samples", "tokens")
    table = Table("", "phase", "from", "to", *units, "learning rate", box=None)
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header in ("", "phase", "learning rate") else "right"
    for curve in curves:
        for number, row in enumerate(schedule_plan.rows(curve)):
            steps = [_short(scale.iterations(count)) for count in (row.begin, row.end)]
            lengths = [
                _short(unit(row.end - row.begin))
                for unit in (scale.iterations, scale.samples, scale.tokens)
            ]
            rates = f"{row.lr_begin:.4g} to {row.lr_end:.4g}"
            table.add_row(curve.name if number == 0 else "", row.phase, *steps, *lengths, rates)
    return table


def _short(count: float | None) -> str:
    """Write a count with four digits from a million on: 62.91B."""
    if count is None:
        return "-"
    for size, name in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.4g}{name}"
    return f"{count:g}"


def _legend(curves: Sequence[Curve]) -> list[str]:
    if len(curves) == 1:
        return []
    marks = ["*", *(str(index % 10) for index in range(1, len(curves)))]
    return ["  ".join(f"{m} {c.name}" for m, c in zip(marks, curves, strict=True))]
