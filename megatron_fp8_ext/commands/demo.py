"""`megatron-fp8 demo ...`: small real training runs, on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train a small GPT on real text: BF16 against infir2, or WSD branches.")


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="folder for corpus, logs, checkpoints, page")] = Path(
        "runs/demo"
    ),
    iterations: Annotated[int, typer.Option(help="iterations of each of the two runs")] = 240,
) -> None:
    """Train a small GPT on real text in BF16 and in infir2, from the same start, and compare."""
    if context.invoked_subcommand is not None:
        return
    from megatron_fp8_ext.demo import run

    run.main(output, iterations)


@app.command()
def schedule(
    output: Annotated[
        Path, typer.Option(help="folder for corpus, logs, checkpoints, picture")
    ] = Path("runs/demo-schedule"),
    iterations: Annotated[
        int, typer.Option(help="length of the whole run, a multiple of 20")
    ] = 200,
) -> None:
    """Train one stable run and decay the last 5, 10 and 20 % of it, each from a checkpoint of it."""
    from megatron_fp8_ext.demo import schedule as demo

    demo.main(output, iterations)
