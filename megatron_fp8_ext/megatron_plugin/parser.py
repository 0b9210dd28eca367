"""Teach every Megatron parser our flags, below all of its entry scripts.

`megatron.training.arguments.parse_args` looks `add_megatron_arguments` up as a module global in every
version from 0.14 on, so wrapping that one function reaches pretrain_gpt.py, slime and any other caller.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from megatron_fp8_ext import registry
from megatron_fp8_ext.checkpoint import layout
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import (
    arguments,
    checks,
    compat,
    flags,
    packed_checks,
    packed_flags,
    run,
)


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
            expansion = _expand(argv, frozenset(parser._option_string_actions))
        except UserError as error:
            raise run.stop(error) from error
        parsed, rest = native(list(expansion.argv), namespace)
        try:
            _adopt(expansion, parsed, argv)
        except UserError as error:
            raise run.stop(error) from error
        return parsed, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def _expand(argv: Sequence[str], options: frozenset[str]) -> flags.Expansion:
    has_gpu, gap = compat.process_fp8_gap()
    load = arguments.value(argv, "--load")
    step = arguments.value(argv, "--ckpt-step")
    ours = flags.requested(argv, os.environ) is not None
    facts = flags.Facts(
        options=options,
        has_gpu=has_gpu or not (ours or run.current.wants_cpu),
        fp8_gap=gap,
        environ=os.environ,
        checkpoint=layout.find(load, step) if load and (ours or run.current.wants_cpu) else None,
        megatron=compat.megatron_version(),
    )
    return flags.expand(argv, facts)


def _adopt(expansion: flags.Expansion, parsed: Any, argv: Sequence[str]) -> None:
    """Check the parsed namespace, remember what the run became, and say it once."""
    state = run.current
    if expansion.recipe is not None or state.wants_cpu:
        load = arguments.value(argv, "--load")
        if load:
            found = layout.find(load, arguments.value(argv, "--ckpt-step"))
            checks.checkpoint_fits(parsed, found)
        checks.corpus_exists(parsed)
    packed_checks.check(parsed, state.wants_cpu)
    if expansion.recipe is not None and expansion.recipe.is_fp8:
        checks.shapes_fit_fp8(parsed, expansion.recipe.name, int(os.environ.get("WORLD_SIZE", "1")))
    os.environ.update(expansion.env)
    if expansion.recipe is not None:
        # A plain string: Megatron pickles its arguments into checkpoints.
        parsed.fp8_ext_recipe = expansion.recipe.name
        # Ray actors and spawned workers do not see this command line.
        os.environ[flags.RECIPE_VARIABLE] = expansion.recipe.name
    already_said = state.recipe is not None and state.recipe == expansion.recipe
    state.recipe, state.emulated = expansion.recipe, expansion.emulated
    if not already_said:
        for note in expansion.notes:
            run.say(note)
        if expansion.recipe is not None:
            run.say(f"seams: {', '.join(state.patches)}")
