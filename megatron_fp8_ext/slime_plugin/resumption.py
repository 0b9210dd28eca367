"""From which rollout the same slime command goes on, and what has to be mended for it first.

slime obeys Megatron's tracker and reads the prompts' position from a file of the same number. Both are
written in place, after the weights: a kill or a full disk leaves them empty, behind or cut short.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fp8_ext.checkpoint import complete, layout
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import arguments


def prepare(argv: Sequence[str]) -> list[str]:
    """Make slime continue from the last complete checkpoint of `--load`; returns notes to print.

    Args:
        argv: the command; one with `--ckpt-step` or another format than torch_dist is left alone.

    Raises:
        UserError: the tracker names a checkpoint, and none is complete.
    """
    load = Path(arguments.value(argv, "--load") or "")
    stated = arguments.value(argv, "--ckpt-step") is not None
    if stated or arguments.value(argv, "--ckpt-format") not in (None, "torch_dist"):
        return []
    if not arguments.has(argv, "--load") or not load.is_dir():
        return []
    if (choice := complete.choose(load)) is None:
        return []
    notes = []
    if choice.repair:
        complete.repair(load, choice)
    if choice.reason is not None:
        where = (
            "starting from the beginning"
            if choice.iteration is None
            else f"continuing after rollout {choice.iteration}, the last complete one"
        )
        notes.append(f"{load}: {choice.reason}; {where}")
    position = load / "rollout" / f"global_dataset_state_dict_{choice.iteration}.pt"
    if position.is_file() and not zipfile.is_zipfile(position):
        position.rename(position.with_suffix(".broken"))
        notes.append(f"{position} is cut short and set aside: the prompts begin anew")
    return notes


def advice(args: Any) -> str:
    """Say what to do to go on, with the step that a second run starts from.

    Args:
        args: slime's arguments: `save`.
    """
    folder = getattr(args, "save", None)
    if not folder:
        return "start the same command again (without --save it begins anew)"
    try:
        choice = complete.choose(Path(folder))
    except UserError as error:
        return f"start the same command again ({error})"
    if choice is None:  # another format: Megatron's own choice
        last: object = (Path(folder) / layout.TRACKER).read_text().strip()
    else:
        last = choice.iteration
    if last is None:
        return "start the same command again (no checkpoint is complete yet)"
    return f"start the same command again with --load {folder}: it goes on after rollout {last}"


def last_size(args: Any) -> int:
    """Return the bytes of the last complete checkpoint in `args.save`; 0 without one."""
    folder = getattr(args, "save", None)
    try:
        choice = complete.choose(Path(folder)) if folder else None
    except UserError:
        return 0
    if choice is None or choice.iteration is None:
        return 0
    files = complete.folder_of(Path(str(folder)), choice.iteration).rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
