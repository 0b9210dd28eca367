"""Teach every Megatron parser our flags, below all of its entry scripts.

`megatron.training.arguments.parse_args` looks `add_megatron_arguments` up as a module global in every
version from 0.14 on, so wrapping that one function reaches pretrain_gpt.py, slime and any other caller.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_fp8_ext import registry
from megatron_fp8_ext.checkpoint import complete
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import (
    arguments,
    branch_folder,
    checks,
    command,
    compat,
    flags,
    fused_flags,
    linear_loss,
    packed_checks,
    packed_flags,
    run,
    schedule_flags,
    stats_flags,
)
from megatron_fp8_ext.megatron_plugin import branch as branches
from megatron_fp8_ext.megatron_plugin.branch import Branch
from megatron_fp8_ext.megatron_plugin.command import Command
from megatron_fp8_ext.megatron_plugin.schedule_flags import Scheduled


def wrap_add_megatron_arguments(module: ModuleType) -> None:
    """Replace `add_megatron_arguments` so that the parser it returns expands our flags."""
    original = module.add_megatron_arguments

    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        _describe(parser)
        _expand_before_parsing(parser)
        return parser

    module.add_megatron_arguments = add_megatron_arguments  # type: ignore[attr-defined]


def _describe(parser: argparse.ArgumentParser) -> None:
    """Let `--help` name our recipes and flags; parsing itself never sees them."""
    action = parser._option_string_actions.get(flags.RECIPE)
    if action is None:
        raise run.stop(
            UserError(
                f"Megatron {compat.megatron_version()} has no {flags.RECIPE}: block-scaled FP8 needs "
                "Megatron-LM core_v0.14 or later"
            )
        )
    choices = list(action.choices or ())
    action.choices = [*choices, *(n for n in registry.names("recipe") if n not in choices)]
    group = parser.add_argument_group("megatron_fp8_ext")
    group.add_argument(
        flags.EMULATE,
        action="store_true",
        help="compute the FP8 recipe by quantize-dequantize instead of FP8 GEMMs (slow)",
    )
    group.add_argument(
        flags.NO_PARAM_GATHER,
        action="store_true",
        help="keep the weights in BF16 and cast them at each use (same numbers, more memory)",
    )
    group.add_argument(
        stats_flags.INTERVAL,
        type=int,
        metavar="N",
        help="every N iterations, write the error of each layer's FP8 casts (JSON, TensorBoard)",
    )
    group.add_argument(
        stats_flags.DIRECTORY,
        metavar="DIR",
        help="where to write it (default: --tensorboard-dir, or --save)",
    )
    group.add_argument(
        linear_loss.FLAG,
        choices=linear_loss.VALUES,
        default=None,
        help="compute LM head and loss together, without full logits (default: one-pass, fused layers)",
    )
    for flag, text in fused_flags.HELP.items():
        group.add_argument(flag, action="store_true", help=text)
    for flag, text in schedule_flags.HELP.items():
        group.add_argument(flag, help=text)
    for flag, what in (
        (packed_flags.DATA, "train on the packed samples of this directory (`data pack`)"),
        (packed_flags.VALID_DATA, "directory of packed samples for validation"),
    ):
        group.add_argument(flag, metavar="DIR", help=what)
    group.add_argument(
        packed_flags.LOSS, default="infialign", help="loss of --sft-data, by its registered name"
    )
    group.add_argument(
        packed_flags.SCOPE,
        choices=packed_flags.SCOPES,
        default="batch",
        help="pack inside each global batch of samples, or each epoch once (batches of packs)",
    )
    group.add_argument(
        packed_flags.EPOCHS, type=int, help="epochs of --sft-data, instead of --train-iters"
    )
    group.add_argument(
        packed_flags.DOCUMENT_END,
        type=int,
        help="token that ends documents, if not the tokenizer's",
    )
    if packed_flags.DOCUMENTS not in parser._option_string_actions:  # native from 0.19
        group.add_argument(
            packed_flags.DOCUMENTS, action="store_true", help="no attention across documents"
        )


def _expand_before_parsing(parser: argparse.ArgumentParser) -> None:
    """Override `parse_known_args` on the instance: `parse_args` goes through it as well."""
    native = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        argv = list(sys.argv[1:] if args is None else args)
        try:
            found, expansion = _expand(argv, frozenset(parser._option_string_actions))
        except UserError as error:
            raise run.stop(error) from error
        parsed, rest = native(list(expansion.argv), namespace)
        try:
            _adopt(found, expansion, parsed)
        except UserError as error:
            raise run.stop(error) from error
        return parsed, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def _expand(argv: Sequence[str], options: frozenset[str]) -> tuple[Command, flags.Expansion]:
    has_gpu, gap = (True, None) if run.current.gpus_elsewhere else compat.process_fp8_gap()
    ours = flags.ours(argv, os.environ) or run.current.wants_cpu
    found = command.read(argv) if ours else Command(Scheduled(argv=tuple(argv)))
    facts = flags.Facts(
        options=options,
        has_gpu=has_gpu or not ours,
        fp8_gap=gap,
        environ=os.environ,
        checkpoint=found.layout,
        megatron=compat.megatron_version(),
    )
    return found, flags.expand(found.scheduled.argv, facts)


def _adopt(found: Command, expansion: flags.Expansion, parsed: Any) -> None:
    """Check the parsed namespace, remember what the run became, and say it once."""
    state, branch = run.current, found.scheduled.branch
    ours = expansion.recipe is not None or found.scheduled.notes or state.wants_cpu
    if ours:
        checks.checkpoint_fits(parsed, found.layout)
        checks.corpus_exists(parsed)
    packed_checks.check(parsed, state.wants_cpu)
    if expansion.recipe is not None and expansion.recipe.is_fp8:
        checks.shapes_fit_fp8(parsed, expansion.recipe.name, int(os.environ.get("WORLD_SIZE", "1")))
    if branch is not None:
        branches.same_order(branch, parsed)
        branches.enough_data(branch, branch.point.available_samples)
        if found.choice is not None and found.choice.iteration == branch.end_iteration:
            run.say(f"the branch in {found.root} is finished, at iteration {branch.end_iteration}")
            raise SystemExit(0)
    elif found.scheduled.phases is not None and found.layout is not None:
        checks.schedule_continues(parsed, command.state_of(found.layout))
    _write(found, branch)
    os.environ.update(expansion.env)
    if expansion.recipe is not None:
        # A plain string: Megatron pickles its arguments into checkpoints.
        parsed.fp8_ext_recipe = expansion.recipe.name
        # Megatron writes its arguments into event files, where `watch` finds the device's peak by it.
        parsed.fp8_ext_device = compat.device_name()
        # Ray actors and spawned workers do not see this command line.
        os.environ[flags.RECIPE_VARIABLE] = expansion.recipe.name
        os.environ[fused_flags.VARIABLE] = expansion.fused.text
    state.recipe, state.emulated = expansion.recipe, expansion.emulated
    state.stats = expansion.stats
    state.fused, state.stash = expansion.fused.on, expansion.fused.stash
    state.linear_loss = expansion.linear_loss
    state.branch = branch
    state.branch_started = found.started
    notes = (*found.notes, *expansion.notes)
    if notes and notes != state.said:
        state.said = notes
        asked = flags.ours(sys.argv[1:], os.environ)
        seams = f" | seams: {', '.join(state.patches)}" if asked else ""
        for number, note in enumerate(notes):
            run.say(note + seams if number == 0 else note)
        if asked:
            run.say(f"versions: {json.dumps(compat.versions())}")


def _write(found: Command, branch: Branch | None) -> None:
    """Note a new branch in its folder, and mend a tracker that a killed run left behind."""
    if run.rank() != 0:
        return
    try:
        if branch is not None and not found.started:
            save = arguments.value(found.scheduled.argv, "--save")
            assert save is not None
            branch_folder.write_record(Path(save), branch)
        if found.root is not None and found.choice is not None and found.choice.repair:
            complete.repair(found.root, found.choice)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename}: {error.strerror}; mend its rights"
        ) from error
