"""What this process's run became: one value, set once when Megatron's arguments are parsed."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_fp8_ext.checkpoint.sample_plan import SamplePlan
from megatron_fp8_ext.megatron_plugin.branch import Branch
from megatron_fp8_ext.recipe import FP8Recipe

if TYPE_CHECKING:
    from megatron_fp8_ext.megatron_plugin.stats_flags import Stats


@dataclass
class Run:
    """State of this process.

    Attributes:
        recipe: the FP8 recipe; None before parsing and in runs that ask for none of ours.
        emulated: whether its GEMMs are emulated.
        on_cpu: whether Megatron runs without a GPU.
        patches: names of the upstream symbols replaced so far.
        stats: interval and folder of the numerics taps; None without them.
        branch: the decay branch that this run is.
        branch_started: whether it continues from a checkpoint of its own.
        sample_plan: how the training data was sized, once it is built on this rank.
        said: what was printed last, so that a second parser does not repeat it.
        wants_cpu: an entry script of ours runs, which trains without a GPU even in BF16.
        gpus_elsewhere: this process only parses; Ray actors train, and check their own GPUs.
        fused: whether layers may go through the fused functions.
        stash: whether a fused MLP keeps fc1's output in 8 bits.
        linear_loss: how head and loss are computed: `off` (Megatron's way), `chunked` or `one-pass`.
    """

    recipe: FP8Recipe | None = None
    emulated: bool = False
    on_cpu: bool = False
    patches: list[str] = field(default_factory=list)
    branch: Branch | None = None
    branch_started: bool = False
    sample_plan: SamplePlan | None = None
    said: tuple[str, ...] = ()
    wants_cpu: bool = False
    stats: Stats | None = None
    gpus_elsewhere: bool = False
    fused: bool = False
    stash: bool = False
    linear_loss: str = "off"


current = Run()


def rank() -> int:
    """Return this process's global rank (0 outside of a launcher)."""
    return int(os.environ.get("RANK", "0"))


def say(message: str, here: bool | None = None) -> None:
    """Print one line on rank 0, or where `here` is true: a figure that another rank alone has."""
    if rank() == 0 if here is None else here:
        who = f" [rank {rank()}]" if rank() else ""
        print(f"megatron_fp8_ext{who}: {message}", flush=True)


def stop(error: Exception) -> SystemExit:
    """Print the error as one line on standard error and return the exit to raise (code 2).

    Every rank meets the same error, so rank 0 alone prints it.
    """
    if rank() == 0:
        print(f"megatron_fp8_ext: error: {error}", file=sys.stderr, flush=True)
    return SystemExit(2)
