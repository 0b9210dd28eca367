"""What entrypoints/train_slime.py runs: a slime command with our flags, checked, in Ray.

python entrypoints/train_slime.py [train.py | train_async.py] <slime's flags> --fp8-recipe infir2-rl
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_fp8_ext.checkpoint import layout
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import arguments, flags, fused_flags, import_hook, run
from megatron_fp8_ext.recipe import FP8Recipe, get_recipe
from megatron_fp8_ext.slime_plugin import (
    checkout,
    failures,
    leftovers,
    preflight,
    resumption,
    sft,
    transport,
)

INIT = "megatron_fp8_ext.slime_plugin.init"
GATHER = "--fp8-param-gather"
KEPT = (
    "weights stay BF16: slime takes its FP32 main parameters from the model's weights, and FP8 ones "
    f"would round them; {GATHER} keeps them in FP8 nevertheless"
)


def main(argv: Sequence[str] | None = None, repository: Path | None = None) -> None:
    """Parse, check and train.

    Args:
        argv: the command line without the program; sys.argv by default.
        repository: root of this repository, for third_party/slime.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    script = words.pop(0) if words and words[0] in checkout.SCRIPTS else checkout.SCRIPTS[0]
    try:
        _run(script, words, repository)
    except UserError as error:
        raise run.stop(error) from error


def _run(script: str, words: list[str], repository: Path | None) -> None:
    slime = checkout.find(os.environ, repository)
    sys.path.insert(0, str(slime.root))
    name = flags.requested(words, os.environ)
    recipe = get_recipe(name) if name is not None else None
    written, words = words, implied(words, recipe)
    sys.argv = [script, *words]
    preflight.refuse_unsafe_loading(os.environ)
    variables: dict[str, str] = {}
    if recipe is not None:
        if flags.EMULATE in words:
            os.environ[flags.EMULATE_VARIABLE] = "1"
        variables = transport.job_variables(recipe, os.environ)
        environment = transport.runtime_env(variables, os.environ)
        transport.adopt_in_driver(variables)
    else:
        environment = {"env_vars": {}}
    # The actors compute every layer as TransformerEngine does, and the summary says so.
    os.environ.setdefault(fused_flags.VARIABLE, fused_flags.NOT_FUSED.text)
    # The GPUs are the actors'; each of them checks its own in `init`.
    run.current.gpus_elsewhere = flags.EMULATE not in words
    import_hook.install()
    mended = resumption.prepare(words)
    args, notes = parse(recipe)
    if flags.NO_PARAM_GATHER in words and flags.NO_PARAM_GATHER not in written:
        notes = [*notes, KEPT]
    for note in (*mended, *notes):
        run.say(note)
    module = _load(slime.root / script)
    _start_ray(args, environment, slime.root)
    try:
        with failures.watched(args):
            module.train(args)
    except Exception as error:
        cause = failures.explain(error, args)
        if cause is None:
            raise
        raise cause from error
    finally:
        import ray

        ray.shutdown()


def implied(words: Sequence[str], recipe: FP8Recipe | None) -> list[str]:
    """Return the flags with those added that slime sets by itself, where our expansion asks for them."""
    out = list(words)
    if recipe is None:
        return out
    for flag, unless in (
        ("--bf16", "--fp16"),
        ("--use-distributed-optimizer", "--use-torch-fsdp2"),
    ):
        if not arguments.has(out, flag) and not arguments.has(out, unless):
            out.append(flag)
    own = arguments.first_written(out, (GATHER, flags.NO_PARAM_GATHER))
    if recipe.is_fp8 and flags.EMULATE not in out and own is None and _starts_from_weights(out):
        out.append(flags.NO_PARAM_GATHER)
    return out


def _starts_from_weights(words: Sequence[str]) -> bool:
    """Whether slime loads weights alone: of `--ref-load`, or of a Hugging Face folder in `--load`."""
    load = arguments.value(words, "--load")
    return load is None or not (Path(load) / layout.TRACKER).is_file()


def parse(recipe: FP8Recipe | None) -> tuple[Any, list[str]]:
    """Return slime's arguments by slime's own parser, with our additions, and notes to print.

    Raises:
        UserError: an unknown flag, or what `preflight` refuses.
    """
    with leftovers.watch() as seen:
        slime = importlib.import_module("slime.utils.arguments")
        args = slime.parse_args(add_custom_arguments=add_arguments)
    seen.check()
    if recipe is not None:
        transport.check_train_env_vars(getattr(args, "train_env_vars", None), recipe)
    own = getattr(args, "custom_megatron_init_path", None)
    if own and own != INIT:
        args.fp8_ext_next_init = own
    args.custom_megatron_init_path = INIT
    return args, preflight.check(args, recipe, os.environ)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags to slime's parser (its `add_custom_arguments`)."""
    if "--allow-mixed-rollout" in parser._option_string_actions:
        return parser
    group = parser.add_argument_group("megatron_fp8_ext (slime)")
    group.add_argument("--sft-too-long", choices=sft.POLICIES, default="drop")
    group.add_argument("--max-dropped-groups", type=int, default=None)
    group.add_argument("--length-penalty-buffer", type=int, default=1024)
    group.add_argument("--length-penalty-factor", type=float, default=1.0)
    group.add_argument("--max-train-rollout-diff", type=float, default=None)
    group.add_argument("--rollout-patience", type=float, default=300.0)
    group.add_argument(preflight.ALLOW_MIXED, action="store_true")
    if "--trust-remote-code" not in parser._option_string_actions:
        group.add_argument("--trust-remote-code", action="store_true")
    return parser


def _load(script: Path) -> ModuleType:
    """Import slime's train.py or train_async.py, whose `train(args)` both commits have."""
    spec = importlib.util.spec_from_file_location(f"slime_{script.stem}", script)
    if spec is None or spec.loader is None or not script.is_file():
        raise UserError(f"no {script.name} in {script.parent}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _start_ray(args: Any, environment: dict[str, Any], root: Path) -> None:
    """Connect to the cluster of this node, or start one; every worker gets the job's variables."""
    import ray

    if ray.is_initialized():
        raise UserError(
            "Ray was started before our variables could reach its workers; start it later"
        )
    variables = dict(environment["env_vars"])
    # Workers import slime too. A submitted job that sets PYTHONPATH itself has slime on it already.
    if "PYTHONPATH" not in transport.submitted(os.environ):
        places = [str(root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        variables["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(places))
    gpus = None
    if flags.EMULATE in sys.argv and not os.environ.get("RAY_ADDRESS"):
        gpus = args.actor_num_nodes * args.actor_num_gpus_per_node + (args.rollout_num_gpus or 0)
    local: dict[str, Any] = {}
    if gpus is not None:
        # slime's actors, its rollout manager, lock and engines each ask for a CPU: on a small machine
        # they would wait for each other for ever.
        cpus = max(os.cpu_count() or 1, gpus + 4)
        local = {"num_gpus": gpus, "num_cpus": cpus, "include_dashboard": False}
        # A cluster that happens to run here has none of these GPUs: the run would wait for them.
        local["address"] = "local"
    ray.init(runtime_env={"env_vars": variables}, **local)
