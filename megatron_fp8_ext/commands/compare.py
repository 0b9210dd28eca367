"""`megatron-fp8 compare` and `megatron-fp8 report`: is FP8 as good as BF16 here?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_fp8_ext.errors import UserError

CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True}


def compare(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="folder for runs and report")],
    recipes: Annotated[
        str, typer.Option(help="NAME[:OPTION],... ; bf16 is the baseline")
    ] = "bf16,infir2,control-e5m2",
    seeds: Annotated[int, typer.Option(help="runs of each recipe; 2 or more for a verdict")] = 3,
    steps: Annotated[
        int | None, typer.Option(help="iterations of each run (default: the command's)")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(help="runs at a time (default: as many as the GPUs hold)")
    ] = None,
    stats_interval: Annotated[
        int | None,
        typer.Option(help="iterations between numerics samples (default: steps/10, <= 100)"),
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="command run after each run; see docs/proof.md")
    ] = None,
) -> None:
    """Train COMMAND (after `--`) once per recipe and seed, then write the report.

    `demo` in place of COMMAND is the demo's small model on CPython's documentation. Interrupted, the same
    command goes on where it stopped.
    """
    from megatron_fp8_ext.proof import page, plan, report, run

    page.require()
    console = Console()
    command = [word for i, word in enumerate(context.args) if i or word != "--"]
    if not command:
        raise UserError(
            "compare what? give a training command after --, such as: megatron-fp8 compare --output runs/a "
            "-- torchrun --nproc-per-node 1 pretrain_gpt.py FLAGS; or `demo`"
        )
    if command == ["demo"]:
        from megatron_fp8_ext.demo import run as demo

        command = demo.command(demo.corpus(output / "corpus" / "text", console), steps or 240)
    elif command[0] == "demo":
        raise UserError(f"demo takes no flags of its own: unknown {' '.join(command[1:])}")
    elif len(command) == 1:
        raise UserError(
            f"'{command[0]}' alone is no training command; of a preset, "
            "`megatron-fp8 run NAME --dry-run` prints it: paste it after --"
        )
    names = [name for name in recipes.split(",") if name]
    members = plan.plan(command, names, seeds, steps, output, stats_interval)
    try:
        run.execute(members, console, parallel, score)
    except KeyboardInterrupt:
        report.write([output], output, console)
        raise typer.Exit(130) from None
    found = report.write([output], output, console)
    if any(each.run.status != "finished" for each in found.runs):
        raise typer.Exit(1)


def report_(
    folders: Annotated[list[Path], typer.Argument(help="outputs of compare")],
    output: Annotated[
        Path | None, typer.Option(help="folder for the report (default: the first of them)")
    ] = None,
) -> None:
    """Write report.html, report.md and report.json of finished and unfinished runs."""
    from megatron_fp8_ext.proof import report

    report.write(folders, output or folders[0], Console())
