"""`megatron-fp8 demo ...`: small real training runs, on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Train a small GPT: BF16 against infir2, packed SFT, or the decay branches of a WSD run."
)


@app.callback(invoke_without_command=True)
def pretrain(
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


@app.command()
def sft(
    output: Annotated[Path, typer.Option(help="folder for data and logs")] = Path("runs/demo-sft"),
    samples: Annotated[
        int | None, typer.Option(help="generated reasoning samples (default: 320; more on a GPU)")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="epochs of each run (default: 2; 1 with --pretrained)")
    ] = None,
    pretrained: Annotated[
        bool,
        typer.Option(
            "--pretrained", help="two stages from SmolLM2-135M-Instruct's released weights"
        ),
    ] = False,
    parallel: Annotated[
        int | None,
        typer.Option(help="of --pretrained: runs at a time (default: one a GPU); 2 may share one"),
    ] = None,
) -> None:
    """Packed SFT on a generated, verifiable reasoning set, in BF16 and in infir2."""
    if pretrained:
        from megatron_fp8_ext.demo import two_stages

        two_stages.main(output, samples, epochs, parallel)
        return
    from megatron_fp8_ext.demo import sft as run

    run.main(output, samples or 320, epochs or 2)
