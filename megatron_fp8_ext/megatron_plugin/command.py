"""What a command stands on: its schedule, and the checkpoint it will continue from. Only reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fp8_ext.checkpoint import complete, layout, state
from megatron_fp8_ext.checkpoint.complete import Choice
from megatron_fp8_ext.checkpoint.layout import CheckpointLayout
from megatron_fp8_ext.checkpoint.state import TrainingState
from megatron_fp8_ext.megatron_plugin import arguments, branch_folder, schedule_flags
from megatron_fp8_ext.megatron_plugin.schedule_flags import Scheduled


@dataclass(frozen=True)
class Command:
    """A command line with what it finds on disk.

    Attributes:
        scheduled: the command with native schedule flags.
        root: folder of `--load`; None without one.
        choice: what it continues from; None where Megatron alone decides.
        layout: layout of that checkpoint; None where there is none.
        started: whether it is a branch that continues from a checkpoint of its own.
        forgotten: a `--save` folder with checkpoints that the command does not load.
    """

    scheduled: Scheduled
    root: Path | None = None
    choice: Choice | None = None
    layout: CheckpointLayout | None = None
    started: bool = False
    forgotten: Path | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for rank 0."""
        if self.forgotten is not None:
            return (
                *self.scheduled.notes,
                f"--save {self.forgotten} holds checkpoints, and without --load {self.forgotten} this run "
                "starts from the beginning and writes over them",
            )
        if self.choice is None or self.choice.reason is None:
            return self.scheduled.notes
        where = (
            "starting from the beginning"
            if self.choice.iteration is None
            else f"continuing from iteration {self.choice.iteration}, the last complete one"
        )
        return (*self.scheduled.notes, f"{self.root}: {self.choice.reason}; {where}")


def read(argv: Sequence[str]) -> Command:
    """Resolve our schedule flags and the checkpoint of a command.

    Raises:
        UserError: what the flags ask for cannot be.
    """
    located = branch_folder.locate(argv)
    if located is None:
        scheduled = schedule_flags.expand(argv)
    else:
        scheduled = schedule_flags.expand(argv, located.point, located.started)
    load = arguments.value(scheduled.argv, "--load")
    if load is None:
        save = arguments.value(scheduled.argv, "--save")
        taken = save is not None and (Path(save) / layout.TRACKER).is_file()
        return Command(scheduled, forgotten=Path(save) if save and taken else None)
    root, step = Path(load), arguments.value(scheduled.argv, "--ckpt-step")
    choice = None
    if step is None and arguments.value(scheduled.argv, "--ckpt-format") in (None, "torch_dist"):
        choice = complete.choose(root)
    if choice is not None:
        if choice.iteration is None:
            return Command(scheduled, root, choice)
        step = str(choice.iteration)
    started = located is not None and located.started
    return Command(scheduled, root, choice, layout.find(load, step), started)


def state_of(found: CheckpointLayout) -> TrainingState | None:
    """Return the common state of the checkpoint to continue from; None where its format hides it."""
    if found.optimizer in ("none", "unknown"):
        return None
    return state.read(found.path, found.iteration)
