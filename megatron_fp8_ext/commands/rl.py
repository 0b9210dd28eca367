"""`megatron-fp8 rl ...`: settings for reinforcement learning through slime."""

from __future__ import annotations

from typing import Annotated

import typer

from megatron_fp8_ext.errors import unknown_name

app = typer.Typer(help="Reinforcement learning through slime.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `flags` a sub-command."""


@app.command()
def flags(
    stage: Annotated[str, typer.Argument(help="1 (answers up to 8k tokens) or 2 (16k)")],
    length_penalty: Annotated[
        bool, typer.Option("--length-penalty", help="add the soft penalty of over-long answers")
    ] = False,
) -> None:
    """Print slime's flags of one of the reference's RL stages."""
    from megatron_fp8_ext.slime_plugin.stages import STAGES

    if stage not in STAGES:
        raise unknown_name("RL stage", stage, STAGES)
    print(" ".join(STAGES[stage].flags(length_penalty)))
