"""`init`: what slime calls in every train actor, after its own set-up and before the model is built."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import flags, import_hook, run
from megatron_fp8_ext.recipe import FP8Recipe, ScaleFormat
from megatron_fp8_ext.slime_plugin import transport

# Modules of Megatron that took `get_fp8_context` by name, and so must have been imported after our hook.
_CONTEXT_USER = "megatron.core.transformer.transformer_block"


def init(args: Any) -> None:
    """Hold this actor to its recipe and set slime's seams. Value of `--custom-megatron-init-path`.

    Args:
        args: slime's parsed arguments, the same in every actor.

    Raises:
        UserError: the scale format TransformerEngine imported is not the recipe's, the recipe cannot be
            computed here, or its weights could not be pushed with the same codes. slime then stops before
            the first step.
    """
    recipe = transport.actor_recipe(args, os.environ)
    state = run.current
    if recipe is not None:
        _hold_to(recipe, args)
        state.recipe = recipe
        state.emulated = recipe.is_fp8 and os.environ.get(flags.EMULATE_VARIABLE) == "1"
    from megatron_fp8_ext.slime_plugin import local_layers, mismatch, reduction, weights

    seams = [*reduction.install(), *mismatch.install(args)]
    if recipe is not None and recipe.is_fp8:
        seams += weights.install(recipe.scale_format)
    if getattr(args, "transformer_impl", None) == "local":
        seams += local_layers.install()
    what = recipe.short_str() if recipe is not None else "no FP8"
    how = (
        "EMULATED"
        if state.emulated
        else "TransformerEngine"
        if recipe and recipe.is_fp8
        else "BF16"
    )
    name = recipe.name if recipe is not None else "none"
    run.say(f"slime actor: recipe {name} | {what} | {how} | seams: {', '.join(seams) or 'none'}")
    following = getattr(args, "fp8_ext_next_init", None)
    if following:
        module, _, function = following.rpartition(".")
        getattr(importlib.import_module(module), function)(args)


def _hold_to(recipe: FP8Recipe, args: Any) -> None:
    """Check that this process computes `recipe`, in the scale format and by the kernels asked for."""
    if not recipe.is_fp8:
        return
    for name, wanted in recipe.environment.items():
        found = os.environ.get(name)
        if found is not None and found != wanted:
            raise UserError(_scales_message(recipe, f"the actor's environment has {name}={found}"))
    emulated = os.environ.get(flags.EMULATE_VARIABLE) == "1"
    import torch

    if not torch.cuda.is_available() and not emulated:
        raise UserError(
            f"recipe {recipe.name}: this Ray actor sees no GPU, and Megatron would train in BF16 without a "
            "word; give it a GPU, or add --fp8-emulate to compute the recipe on the CPU (slow)"
        )
    if not emulated:
        imported = te_scale_format()
        if imported is None:
            raise UserError(
                f"recipe {recipe.name}: this Ray actor has no TransformerEngine with block scaling; pip "
                'install --no-build-isolation "transformer_engine[pytorch]>=2.4" on every node'
            )
        if imported != recipe.scale_format:
            raise UserError(
                _scales_message(recipe, f"TransformerEngine was imported with {imported} scales")
            )
    import_hook.install()
    _check_context_is_ours()


def _scales_message(recipe: FP8Recipe, found: str) -> str:
    name, wanted = next(iter(recipe.environment.items()))
    return (
        f"recipe {recipe.name} has {recipe.scale_format} scales, but {found}; set "
        f"{name}={wanted} with slime's "
        f'--train-env-vars \'{{"{name}": "{wanted}"}}\' or in Ray\'s runtime environment (not in the actor, '
        "where TransformerEngine is imported already), or start with entrypoints/train_slime.py"
    )


def te_scale_format() -> ScaleFormat | None:
    """Return the scale format that the imported TransformerEngine computes with; None without one.

    Read off its recipe class, not off the environment: TE reads `NVTE_FP8_BLOCK_SCALING_FP32_SCALES` once,
    when that class is defined.
    """
    try:
        recipes = importlib.import_module("transformer_engine.common.recipe")
        weight = recipes.Float8BlockScaling().fp8_quant_fwd_weight
    except Exception:  # no TE, no CUDA for it, or one without block scaling
        return None
    return "power_of_two" if weight.power_2_scale else "float32"


def _check_context_is_ours() -> None:
    """The model must enter our FP8 context: the hook has to come before Megatron's own imports."""
    utils = sys.modules.get("megatron.core.fp8_utils")
    user = sys.modules.get(_CONTEXT_USER)
    if utils is None or user is None:
        return
    if user.get_fp8_context is not utils.get_fp8_context:
        raise UserError(
            "Megatron was imported in this Ray actor before our seam was set: put "
            f"{flags.RECIPE_VARIABLE} into Ray's runtime environment (entrypoints/train_slime.py does), and "
            "leave TORCH_DEVICE_BACKEND_AUTOLOAD on"
        )
