"""The recipe's name and scale format through the environment, into every Ray actor.

A Ray actor's sys.argv is Ray's own and slime pickles only parsed arguments, while TransformerEngine reads its
scale format from the environment when it is imported. So the launcher sets both variables in its own process
(slime HEAD copies the second from there into its train actors) and in Ray's job-wide runtime environment
(which reaches all of them at both commits). Standard library only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin.flags import EMULATE_VARIABLE, RECIPE_VARIABLE
from megatron_fp8_ext.recipe import INFIR2, INFIR2_RL, TE_FP32_SCALES, FP8Recipe, get_recipe

# Ours to carry on to the workers where they are set.
_INHERITED = ("MEGATRON_FP8_EXT", EMULATE_VARIABLE)


def job_variables(recipe: FP8Recipe, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that every process of the job must see."""
    variables = {RECIPE_VARIABLE: recipe.name, **recipe.environment}
    variables.update({name: environ[name] for name in _INHERITED if name in environ})
    return variables


def runtime_env(variables: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the `runtime_env` for `ray.init`.

    Under `ray job submit` the job already has one, in RAY_JOB_CONFIG_JSON_ENV_VAR; Ray merges the two
    and refuses a variable that stands in both with different values. That is our error to give first.

    Raises:
        UserError: the submitted runtime environment contradicts the recipe.
    """
    theirs = submitted(environ)
    for name, wanted in variables.items():
        found = theirs.get(name)
        if found is not None and found != wanted:
            raise UserError(
                f"--runtime-env-json sets {name}={found}, and --fp8-recipe "
                f"{variables[RECIPE_VARIABLE]} needs {name}={wanted}; drop it there"
            )
    return {"env_vars": {k: v for k, v in variables.items() if k not in theirs}}


def submitted(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that `ray job submit --runtime-env-json` set for this job."""
    text = environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
    if not text:
        return {}
    try:
        found = json.loads(text).get("runtime_env", {}).get("env_vars", {})
    except (ValueError, AttributeError):
        return {}
    return {str(name): str(value) for name, value in found.items()}


def check_train_env_vars(train_env_vars: Mapping[str, str] | None, recipe: FP8Recipe) -> None:
    """Check slime HEAD's `--train-env-vars`, which win over everything else in train actors.

    Raises:
        UserError: it names another scale format or another recipe.
    """
    for name, wanted in {RECIPE_VARIABLE: recipe.name, **recipe.environment}.items():
        found = (train_env_vars or {}).get(name)
        if found is not None and str(found) != wanted:
            raise UserError(
                f"--train-env-vars sets {name}={found}, and recipe {recipe.name} needs {wanted}; "
                "drop it there"
            )


def actor_recipe(args: Any, environ: Mapping[str, str]) -> FP8Recipe | None:
    """Return the recipe this process was meant to have; None for a run without FP8.

    The name travels in the environment. A command of native flags may carry only the scale format
    (`--train-env-vars '{"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "0"}'`), which names one of our two.

    Args:
        args: slime's parsed arguments.
        environ: of the actor.

    Raises:
        UserError: FP8 is asked for and nothing says which; or two places say different things.
    """
    name = environ.get(RECIPE_VARIABLE)
    parsed = getattr(args, "fp8_ext_recipe", None)
    if name and parsed and name != parsed:
        raise UserError(
            f"the command says --fp8-recipe {parsed} and this Ray actor's environment "
            f"{RECIPE_VARIABLE}={name}; drop the variable from the runtime environment"
        )
    if name or parsed:
        recipe = get_recipe(str(name or parsed))
        if recipe.is_fp8 and not getattr(args, "fp8", None):
            raise UserError(
                f"{RECIPE_VARIABLE}={recipe.name}, but the arguments ask for no FP8: add --fp8-format "
                "e4m3 --fp8-recipe blockwise, or start with entrypoints/train_slime.py"
            )
        if not recipe.is_fp8 and getattr(args, "fp8", None):
            raise UserError(f"recipe {recipe.name} contradicts --fp8-format {args.fp8}: drop one")
        return recipe
    if not getattr(args, "fp8", None):
        return None
    return _from_scale_format(args, environ)


def _from_scale_format(args: Any, environ: Mapping[str, str]) -> FP8Recipe:
    stated = (getattr(args, "train_env_vars", None) or {}).get(TE_FP32_SCALES)
    if stated is None:
        stated = environ.get(TE_FP32_SCALES)
        # slime HEAD sets "1" itself when nobody did, so there "1" is nobody's decision.
        if stated == "1" and hasattr(args, "train_env_vars"):
            stated = None
    if stated is None:
        raise UserError(
            "FP8 is on and nothing says with which scales (slime sets FP32 scales when nobody does): add "
            f'--train-env-vars \'{{"{TE_FP32_SCALES}": "0"}}\' for infir2 or "1" for infir2-rl, or '
            f"{RECIPE_VARIABLE} to Ray's runtime environment"
        )
    return INFIR2_RL if str(stated) == "1" else INFIR2


def adopt_in_driver(variables: Mapping[str, str]) -> None:
    """Set the variables in this process: slime HEAD reads the scale format from here."""
    os.environ.update(variables)
