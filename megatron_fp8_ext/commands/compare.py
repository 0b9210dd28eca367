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
        int | None,
        typer.Option(help="runs at a time (default: one a GPU); more than that share GPUs"),
    ] = None,
    stats_interval: Annotated[
        int | None,
        typer.Option(help="iterations between numerics samples (default: steps/10, <= 100)"),
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="command run after each run; see docs/proof.md")
    ] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="make data and starting weights; train nothing")
    ] = False,
) -> None:
    """Train COMMAND (after `--`) once per recipe and seed, then write the report.

    In place of COMMAND, with Megatron flags to add: `demo`, `smollm2-cpt`, `qwen2.5-0.4b` or `smollm2-sft`;
    or a preset with its inputs: `qwen2.5-1.5b-cpt data=PREFIX model=DIR init=DIR`.

    Interrupted, the same command goes on where it stopped.
    """
    from megatron_fp8_ext.proof import page

    page.require()
    from megatron_fp8_ext import presets
    from megatron_fp8_ext.demo import proofs
    from megatron_fp8_ext.proof import plan, report, run

    console = Console()
    command = [word for i, word in enumerate(context.args) if i or word != "--"]
    if not command:
        raise UserError(
            f"compare what? one of {', '.join(proofs.PROOFS)}; a preset; or a training command, such as: "
            "megatron-fp8 compare --output runs/a -- torchrun --nproc-per-node 1 pretrain_gpt.py FLAGS"
        )
    if command[0] in proofs.PROOFS:
        ready, steps = proofs.prepare(command, output / "start", steps, console)
        command, score = list(ready.command), score or ready.score
    elif command[0] in presets.names():
        command = _of_preset(command, output)
    elif len(command) == 1:
        raise UserError(
            f"'{command[0]}' alone is no training command, no preset, nor one of "
            f"{', '.join(proofs.PROOFS)}"
        )
    names = [name for name in recipes.split(",") if name]
    members = plan.plan(command, names, seeds, steps, output, stats_interval)
    if prepare:
        console.print(
            f"{len(members)} runs are ready in {output}: the same command without --prepare"
        )
        return
    try:
        run.execute(members, console, parallel, score)
    except KeyboardInterrupt:
        report.write([output], output, console)
        raise typer.Exit(130) from None
    found = report.write([output], output, console)
    if not all(each.run.ended_well for each in found.runs):
        raise typer.Exit(1)


def _of_preset(words: list[str], output: Path) -> list[str]:
    """The training command of a preset on this machine.

    Args:
        words: NAME, then KEY=VALUE (as `run --KEY VALUE` for its inputs, as `run --set` for the rest), then
            Megatron flags.
        output: of the comparison; what the runs share goes below it.
    """
    import os
    import sys

    from megatron_fp8_ext import presets
    from megatron_fp8_ext.launch import checks, plan, render, request, start
    from megatron_fp8_ext.megatron_plugin import arguments

    at = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    inputs, settings = {"output": str(output / "shared")}, []
    for word in words[1:at]:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{words[0]} {word}: write it as key=value; Megatron flags come last")
        if key in request.INPUTS:
            inputs[key] = value
        elif key != "from-scratch":
            settings.append(word)
    asked = request.Request(
        preset=presets.get(words[0]),
        inputs=inputs,
        extra=tuple(words[at:]),
        from_scratch="from-scratch=true" in words[1:at],
    )
    asked = request.with_set(asked, settings)
    planned = plan.build(asked, start.facts(asked))
    if planned.launcher != "torchrun":
        raise UserError(
            f"{words[0]} trains through slime, which compare does not start: an SFT preset "
            "trains with Megatron alone too: add trainer=megatron"
        )
    found = checks.problems(planned)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(f"{words[0]} cannot start: {found[0]}{more}")
    os.environ.update(planned.environment)
    command = [sys.executable, "-m", "torch.distributed.run", *render.torchrun(planned)[1:]]
    if planned.value("--load") == planned.save:  # to go on from: each run has a folder of its own
        command = arguments.without(command, "--load", takes_value=True)
    return command


def report_(
    folders: Annotated[list[Path], typer.Argument(help="outputs of compare")],
    output: Annotated[
        Path | None, typer.Option(help="folder for the report (default: the first of them)")
    ] = None,
) -> None:
    """Write report.html, report.md and report.json of finished and unfinished runs."""
    from megatron_fp8_ext.proof import report

    report.write(folders, output or folders[0], Console())
