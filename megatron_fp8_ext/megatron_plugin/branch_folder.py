"""Find the checkpoint a branch begins at, and keep a note of it in the branch's own folder.

The note (`decay_branch.json`) is what lets the same command be given again after a crash: it then
continues from the branch's own checkpoints, though the stable run may have gone on, or be gone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp8_ext.checkpoint import complete, layout, sample_plan, state
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.files import write_atomically
from megatron_fp8_ext.megatron_plugin import arguments, schedule_flags
from megatron_fp8_ext.megatron_plugin.branch import FROM, PLANNED, Branch, BranchPoint, point_at

RECORD = "decay_branch.json"


@dataclass(frozen=True)
class Located:
    """Where a branch begins, and whether its own folder holds a complete checkpoint already."""

    point: BranchPoint
    started: bool = False


def locate(argv: Sequence[str], needs_save: bool = True) -> Located | None:
    """Return what `--wsd-decay-from` names; None without the flag.

    Args:
        argv: the command.
        needs_save: whether the command will train; a plan alone needs no folder.

    Raises:
        UserError: no complete checkpoint there, one that cannot be branched, or a `--save` that is
            missing, the stable run's, or taken by something else.
    """
    if not arguments.has(argv, FROM):
        return None
    root, named = _named(argv)
    if not needs_save:
        return Located(_point(argv, root, named))
    save = _save_folder(argv, root)
    found = complete.choose(save) if save.is_dir() else complete.Choice(None)
    started = found is not None and found.iteration is not None
    recorded = read_record(save)
    if recorded is None:
        if found is None or started:
            raise UserError(
                f"--save {save} holds checkpoints of another run: give the branch a folder of its own"
            )
        return Located(_point(argv, root, named))
    point = recorded.point
    if not started:
        # Killed before its first checkpoint: the same command begins where it began before.
        if named in (None, point.iteration) and _same_folder(root, point) and root.is_dir():
            named = point.iteration
        return Located(_point(argv, root, named))
    if not _same_folder(root, point) or named not in (None, point.iteration):
        raise UserError(
            f"--save {save} holds the branch from {point.name}, not from {arguments.value(argv, FROM)}: "
            "give the new branch a folder of its own"
        )
    made = schedule_flags.plan_branch(argv, point)
    for flag, ours, theirs in (
        ("--wsd-decay-iters", made.decay_iters, recorded.decay_iters),
        (schedule_flags.STYLE, made.decay_style, recorded.decay_style),
        ("--lr", made.lr, recorded.lr),
        ("--min-lr", made.min_lr, recorded.min_lr),
    ):
        if ours != theirs:
            raise UserError(
                f"--save {save} holds the branch with {flag} {theirs}, the command says {ours}: give the "
                "new branch a folder of its own"
            )
    return Located(point, started=True)


def _named(argv: Sequence[str]) -> tuple[Path, int | None]:
    """Return (folder of the stable run, iteration or None) of the command."""
    text = arguments.value(argv, FROM)
    if not text:
        raise UserError(f"{FROM} needs a checkpoint folder, or one iteration of it")
    path = Path(text)
    step = arguments.value(argv, "--ckpt-step")
    if step is not None and not step.isdigit():
        raise UserError(f"--ckpt-step {step}: not a whole number")
    digits = path.name.removeprefix("iter_")
    if path.name.startswith("iter_") and digits.isdigit():
        if step is not None and int(step) != int(digits):
            raise UserError(f"--ckpt-step {step} contradicts {FROM} {text}: drop one of the two")
        return path.parent, int(digits)
    return path, None if step is None else int(step)


def _save_folder(argv: Sequence[str], root: Path) -> Path:
    text = arguments.value(argv, "--save")
    if not text:
        raise UserError(f"{FROM} needs --save FOLDER, a new folder for the branch")
    save = Path(text)
    if save.resolve() == root.resolve():
        raise UserError(
            f"--save {save} is the stable run's folder: give the branch a new one, so that the stable "
            "run stays as it is"
        )
    load = arguments.value(argv, "--load")
    if load is not None and Path(load).resolve() not in (save.resolve(), root.resolve()):
        raise UserError(f"{FROM} contradicts --load {load}: a branch loads {root}; drop --load")
    return save


def _point(argv: Sequence[str], root: Path, iteration: int | None) -> BranchPoint:
    if not root.is_dir():
        raise UserError(f"{FROM} {root}: there is no such folder")
    if iteration is None:
        found = complete.choose(root)
        if found is None or found.iteration is None:
            raise UserError(
                f"{FROM} {root}: it holds no complete checkpoint with an iteration; give one that does"
            )
        iteration = found.iteration
    folder = complete.folder_of(root, iteration)
    missing = complete.gap(folder)
    if missing is not None:
        others = [
            n
            for n in complete.iterations(root)
            if complete.gap(complete.folder_of(root, n)) is None
        ]
        mend = f"complete here: {_listed(others)}" if others else f"{root} holds no complete one"
        raise UserError(
            f"{FROM} {folder}: the checkpoint is missing or half-written: {missing}; {mend}"
        )
    tracker = root / layout.TRACKER
    if tracker.is_file() and not tracker.read_text().strip().isdigit():
        raise UserError(
            f"{FROM} {root}: {layout.TRACKER} holds no iteration, and Megatron stops on that; write "
            f"{iteration} into it"
        )
    planned = schedule_flags.number(argv, PLANNED)
    return point_at(
        state.read(folder, iteration),
        layout.read(folder, iteration),
        sample_plan.read(folder),
        None if planned is None else int(planned),
    )


def _listed(iterations: Sequence[int]) -> str:
    shown = ", ".join(map(str, iterations[-6:]))
    return f"iterations {'..., ' if len(iterations) > 6 else ''}{shown}"


def _same_folder(root: Path, point: BranchPoint) -> bool:
    return root.resolve() == Path(point.checkpoint).resolve()


def write_record(save: Path, branch: Branch) -> None:
    """Note the branch in its folder, by a temporary name and a rename."""
    save.mkdir(parents=True, exist_ok=True)
    write_atomically(save / RECORD, json.dumps(dataclasses.asdict(branch), indent=1) + "\n")


def read_record(save: Path) -> Branch | None:
    """Return the branch noted in a folder; None if there is no note.

    Raises:
        UserError: the note cannot be read.
    """
    path = save / RECORD
    try:
        found = json.loads(path.read_text())
        return Branch(**{**found, "point": _parse_point(found["point"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read ({error!r}): give the branch a folder of its own"
        ) from error


def _parse_point(found: dict[str, Any]) -> BranchPoint:
    plan = found.get("plan")
    return BranchPoint(**{**found, "plan": None if plan is None else sample_plan.parse(plan)})
