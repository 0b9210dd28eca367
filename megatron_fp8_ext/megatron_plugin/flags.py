"""`--fp8-recipe infir2` -> Megatron's own flags. Pure: the same function is the dry run.

What comes out is nothing but native Megatron flags and two environment variables, so a checkpoint, a
log or a colleague needs nothing of ours. What the user wrote always stands: a contradiction is an
error that names both flags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_fp8_ext import registry
from megatron_fp8_ext.checkpoint.layout import CheckpointLayout
from megatron_fp8_ext.errors import UserError, unknown_name
from megatron_fp8_ext.megatron_plugin import (
    arguments,
    fused_flags,
    linear_loss,
    packed_flags,
    schedule_flags,
    stats_flags,
)
from megatron_fp8_ext.megatron_plugin.refusals import REFUSALS, WITHOUT_EFFECT
from megatron_fp8_ext.recipe import TE_BACKWARD_OVERRIDE, FP8Recipe, get_recipe

RECIPE = "--fp8-recipe"
EMULATE = "--fp8-emulate"
NO_PARAM_GATHER = "--no-fp8-param-gather"
# The way in where no command line reaches: a Ray actor's sys.argv is Ray's own.
RECIPE_VARIABLE = "MEGATRON_FP8_EXT_RECIPE"
EMULATE_VARIABLE = "MEGATRON_FP8_EXT_EMULATE"
OWN_FLAGS = (EMULATE, NO_PARAM_GATHER)
NATIVE_RECIPES = ("delayed", "tensorwise", "mxfp8", "blockwise", "custom")
MAIN_PARAMS = "--load-main-params-from-ckpt"
NO_STREAM = "--no-stream-ckpt-dequant"
RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"

# On the CPU: what Megatron can only do there, and what it can only do on a GPU. None of it changes
# what is computed, only by which kernel.
CPU_VALUES: dict[str, str] = {
    "--distributed-backend": "gloo",
    "--transformer-impl": "local",
    "--attention-backend": "unfused",
    "--num-workers": "0",
    "--ckpt-format": "torch_dist",
}
CPU_SWITCHES: tuple[str, ...] = (
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-dropout-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-swiglu-fusion",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
)
CPU_DROPPED: dict[str, bool] = {  # flag -> takes a value
    "--use-flash-attn": False,
    "--cross-entropy-loss-fusion": False,
    "--cross-entropy-fusion-impl": True,
    "--use-precision-aware-optimizer": False,
    "--fp8-param-gather": False,
    "--apply-rope-fusion": False,
    "--moe-grouped-gemm": False,
    "--moe-permute-fusion": False,
    "--moe-router-fusion": False,
    "--cuda-graph-impl": True,
    "--cuda-graph-scope": True,
    "--enable-cuda-graph": False,
    "--external-cuda-graph": False,
    "--async-save": False,
    "--optimizer-cpu-offload": False,
    "--te-rng-tracker": False,
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What `expand` needs to know of the machine and of the Megatron that will parse.

    Attributes:
        options: option strings the parser knows.
        has_gpu: whether torch sees a GPU.
        fp8_gap: why FP8 GEMMs cannot run here, in one clause with its mend; None if they can.
        environ: the environment.
        checkpoint: layout of the checkpoint that `--load` will load; None where there is none.
        megatron: version of Megatron, for messages.
    """

    options: frozenset[str]
    has_gpu: bool = True
    fp8_gap: str | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    checkpoint: CheckpointLayout | None = None
    megatron: str = "unknown"


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """The native command.

    Attributes:
        argv: arguments for Megatron's own parser.
        env: variables to set before TransformerEngine computes anything.
        recipe: the recipe asked for; None if the run asks for none of ours.
        emulated: whether the recipe is emulated.
        notes: lines for rank 0, the first one the summary.
        stats: the numerics taps; None without them.
        linear_loss: how head and loss are computed: `off`, `chunked` or `one-pass`.
        fused: what the run asks of the fused path.
    """

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    recipe: FP8Recipe | None = None
    emulated: bool = False
    notes: tuple[str, ...] = ()
    stats: stats_flags.Stats | None = None
    linear_loss: str = "off"
    fused: fused_flags.Fused = fused_flags.NOT_FUSED


def requested(argv: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """Return the recipe asked for that is not one of Megatron's own, or None."""
    name = arguments.value(argv, RECIPE) or environ.get(RECIPE_VARIABLE)
    return None if name in NATIVE_RECIPES else name


def ours(argv: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether the command uses any flag of ours."""
    flags = (*OWN_FLAGS, *fused_flags.FLAGS, stats_flags.INTERVAL, linear_loss.FLAG)
    own = arguments.first_written(argv, flags)
    return own is not None or requested(argv, environ) is not None or schedule_flags.asked(argv)


def expand(argv: Sequence[str], facts: Facts) -> Expansion:
    """Turn our precision flags in `argv` into Megatron's (`schedule_flags` does the schedule's).

    Raises:
        UserError: unknown recipe; a flag that contradicts it; a machine that cannot compute it.
    """
    argv, asked_loss = linear_loss.take(argv)
    argv, stats = stats_flags.take(argv)
    argv, packed = packed_flags.expand(argv)
    out = _expand_recipe(argv, facts)
    out = replace(out, notes=(*out.notes, *packed))
    if stats is not None:
        asks_fp8 = out.recipe.is_fp8 if out.recipe else arguments.has(argv, "--fp8-format")
        note = stats.note if asks_fp8 else f"{stats_flags.INTERVAL}: BF16 casts nothing to sample"
        out = replace(out, stats=stats if asks_fp8 else None, notes=(*out.notes, note))
    loss = linear_loss.chosen(asked_loss, argv, out.fused.on)
    if loss != "off":
        note = f"{linear_loss.FLAG} {loss}: {linear_loss.NOTES[loss]}"
        out = replace(out, linear_loss=loss, notes=(*out.notes, note))
    return out


def _expand_recipe(argv: Sequence[str], facts: Facts) -> Expansion:
    name = requested(argv, facts.environ)
    if name is None:
        return _expand_native(argv, facts)
    if name not in registry.names("recipe"):
        raise unknown_name("--fp8-recipe", name, (*registry.names("recipe"), *NATIVE_RECIPES))
    recipe = get_recipe(name)
    out = arguments.without(argv, RECIPE, takes_value=True)
    emulate, keep_bf16_params = (arguments.has(out, flag) for flag in OWN_FLAGS)
    for flag in OWN_FLAGS:
        out = arguments.without(out, flag, takes_value=False)
    if not recipe.is_fp8:
        return _expand_bf16(out, recipe, facts)

    out, fused = fused_flags.take(out, facts.environ)
    emulated = emulate or not facts.has_gpu
    _refuse(out, recipe, facts, emulated)
    if not emulated and facts.fp8_gap is not None:
        raise UserError(
            f"{RECIPE} {name} cannot compute in FP8 here: {facts.fp8_gap} "
            f"(or add {EMULATE} to train with the recipe emulated, slowly)"
        )
    if recipe.control and not emulated:
        raise UserError(
            f"{RECIPE} {name} is a negative control that no hardware computes: add {EMULATE}"
        )
    notes: list[str] = []
    added = [RECIPE, "blockwise"]
    if not arguments.has(out, "--fp8-format"):
        added += ["--fp8-format", "e4m3"]
    if emulated:
        out = arguments.without(out, "--fp8-param-gather", takes_value=False)
        weights = "weights stay BF16 and are cast at each use, to the same codes"
        out, more = _emulation_flags(out, facts)
        added += more
    else:
        gather, weights = _param_gather(out, recipe, facts, keep_bf16_params)
        added += gather
    ignored = [flag for flag in WITHOUT_EFFECT if arguments.has(out, flag)]
    if ignored:
        notes.append(f"without effect under block scaling: {' '.join(ignored)}")
    if not facts.has_gpu:
        out, note = for_cpu(out, facts.options)
        notes.insert(0, f"no GPU: {RECIPE} {name} is EMULATED on the CPU (same codes and scales)")
        notes.append(note)
    elif emulated:
        notes.insert(0, f"{EMULATE}: {RECIPE} {name} is EMULATED (same codes and scales, slow)")
    if emulated:
        if fused.stash:
            notes.append(f"{fused_flags.STASH}: emulated layers keep BF16")
        fused = fused_flags.NOT_FUSED
    layers = "" if emulated else f" | layers: {_layers(fused)}"
    summary = (
        f"{RECIPE} {name} -> {' '.join(added)} | {recipe.short_str()} | {weights}{layers} | BF16: "
        f"{', '.join(recipe.high_precision)}"
    )
    return Expansion(
        argv=(*out, *added),
        env=recipe.environment,
        recipe=recipe,
        emulated=emulated,
        notes=(summary, *notes),
        fused=fused,
    )


def _layers(fused: fused_flags.Fused) -> str:
    if not fused.on:
        return f"TransformerEngine's ({fused_flags.ON} asks for ours)"
    return "fused where possible" + (", fc1's output kept in 8 bits" if fused.stash else "")


def _expand_native(argv: Sequence[str], facts: Facts) -> Expansion:
    """A run without our recipe passes through; FP8 asked for in native flags is held to it too."""
    own = arguments.first_written(argv, (*OWN_FLAGS, *fused_flags.FLAGS))
    if own is not None:
        raise UserError(f"{own} needs one of our recipes: add {RECIPE} infir2")
    asks_fp8 = arguments.has(argv, "--fp8-format")
    if asks_fp8 and facts.fp8_gap is not None:
        raise UserError(
            f"--fp8-format cannot compute in FP8 here: {facts.fp8_gap}; Megatron would train in "
            f"BF16 without a word. Use {RECIPE} infir2 {EMULATE} to emulate it"
        )
    if facts.has_gpu:
        return Expansion(argv=tuple(argv))
    out, note = for_cpu(argv, facts.options)
    return Expansion(argv=tuple(out), notes=(note,))


def _expand_bf16(argv: list[str], recipe: FP8Recipe, facts: Facts) -> Expansion:
    fp8_only = ("--fp8-format", "--fp8-param-gather", *fused_flags.FLAGS)
    contradiction = arguments.first_written(argv, fp8_only)
    if contradiction is not None:
        raise UserError(f"{RECIPE} {recipe.name} contradicts {contradiction}: drop one of the two")
    notes = [f"{RECIPE} {recipe.name} -> no FP8 flags | {recipe.short_str()}"]
    if not facts.has_gpu:
        argv, note = for_cpu(argv, facts.options)
        notes.append(note)
    return Expansion(argv=tuple(argv), recipe=recipe, notes=tuple(notes))


def _refuse(argv: Sequence[str], recipe: FP8Recipe, facts: Facts, emulated: bool) -> None:
    asked = f"{RECIPE} {recipe.name}"
    for row in REFUSALS:
        if not arguments.has(argv, row.flag):
            continue
        if row.where == ("gpu" if emulated else "emulated"):
            continue
        written = arguments.value(argv, row.flag)
        if row.allowed and written in row.allowed:
            continue
        shown = row.flag if written is None else f"{row.flag} {written}"
        raise UserError(f"{asked} contradicts {shown}: {row.reason}; {row.mend}")
    if not arguments.has(argv, "--bf16"):
        raise UserError(f"{asked} needs --bf16: what is not FP8 computes in BF16; add --bf16")
    if not emulated and arguments.value(argv, "--transformer-impl") == "local":
        raise UserError(
            f"{asked} contradicts --transformer-impl local: Megatron's local layers ignore FP8; "
            f"drop the flag, or add {EMULATE}"
        )
    for variable, wanted in recipe.environment.items():
        found = facts.environ.get(variable)
        if found is not None and found != wanted:
            raise UserError(
                f"{asked} contradicts {variable}={found} in the environment: the recipe's scales "
                f"are {recipe.scale_format}; unset the variable"
            )
    if facts.environ.get(TE_BACKWARD_OVERRIDE, "").lower() not in ("", "none"):
        raise UserError(
            f"{asked} contradicts {TE_BACKWARD_OVERRIDE}={facts.environ[TE_BACKWARD_OVERRIDE]} in "
            "the environment: the recipe's backward is FP8; unset the variable"
        )


def _param_gather(
    argv: Sequence[str], recipe: FP8Recipe, facts: Facts, keep_bf16_params: bool
) -> tuple[list[str], str]:
    """Keep the weights in FP8 where that leaves the optimizer of the run as it is.

    FP8 weights need the distributed optimizer. Switching it on would change the layout of the run's
    checkpoints, and FP8 weights move to a buffer of their own, which the default checkpoint layout
    (`dp_reshardable`: whole buffers) cannot exchange with a BF16 run; the fully reshardable layout
    (parameter by parameter) can, both ways. The numbers are the same with and without.
    """
    written = arguments.has(argv, "--fp8-param-gather")
    if keep_bf16_params:
        if written:
            raise UserError(f"{NO_PARAM_GATHER} contradicts --fp8-param-gather: drop one")
        return [], f"weights stay BF16 ({NO_PARAM_GATHER})"
    if not recipe.param_gather and not written:
        return [], "weights stay BF16 (the recipe's choice)"
    blocker = None
    if not arguments.has(argv, "--use-distributed-optimizer"):
        blocker = "--use-distributed-optimizer is not in the command"
    elif arguments.has(argv, "--optimizer-cpu-offload"):
        blocker = "--optimizer-cpu-offload takes FP8 weights only with delayed scaling"
    elif arguments.value(argv, "--ckpt-format") not in (None, "torch_dist"):
        blocker = f"--ckpt-format {arguments.value(argv, '--ckpt-format')} stores whole buffers"
    elif not _loads_optimizer_safely(argv, facts):
        assert facts.checkpoint is not None
        blocker = (
            f"{facts.checkpoint.path} holds its optimizer state as whole BF16 buffers; save it "
            f"once with {RESHARDABLE}, or start with --no-load-optim"
        )
    if blocker is not None:
        if written:
            raise UserError(f"--fp8-param-gather is not possible here: {blocker}")
        return [], f"weights stay BF16: {blocker}"
    added = [] if written else ["--fp8-param-gather"]
    saves = arguments.has(argv, "--save")
    if saves and RESHARDABLE in facts.options and not arguments.has(argv, RESHARDABLE):
        added.append(RESHARDABLE)
    return [*added, *_main_params(argv, facts)], "weights kept in FP8"


def _main_params(argv: Sequence[str], facts: Facts) -> list[str]:
    """Let a run that starts from weights alone take them as they are for its FP32 main parameters.

    Megatron copies main parameters from the model's unless told otherwise: from FP8 weights they would
    come back rounded to FP8, and the run would not start where its BF16 counterpart does.
    """
    layout = facts.checkpoint
    if layout is None or MAIN_PARAMS not in facts.options:
        return []
    # Megatron 0.19 loads each tensor into the FP8 weight by default ("streaming"), and what it then calls
    # the checkpoint's values are those: the flag alone gives main parameters that lie on FP8's grid.
    stream = (
        [NO_STREAM] if NO_STREAM in facts.options and not arguments.has(argv, NO_STREAM) else []
    )
    if arguments.has(argv, MAIN_PARAMS):
        return stream
    weights_alone = layout.iteration == 0 or arguments.first_written(
        argv, ("--no-load-optim", "--finetune")
    )
    if not weights_alone:
        return []
    needed = () if arguments.has(argv, "--no-load-optim") else ("--no-load-optim",)
    return [*needed, MAIN_PARAMS, *stream]


def _loads_optimizer_safely(argv: Sequence[str], facts: Facts) -> bool:
    layout = facts.checkpoint
    if layout is None or arguments.first_written(argv, ("--no-load-optim", "--finetune")):
        return True
    return layout.optimizer != "whole buffers" or layout.fp8_params


def _emulation_flags(argv: list[str], facts: Facts) -> tuple[list[str], list[str]]:
    if not facts.has_gpu:
        return argv, []  # for_cpu sets the local layers
    if arguments.value(argv, "--transformer-impl") == "transformer_engine":
        raise UserError(
            f"{EMULATE} contradicts --transformer-impl transformer_engine: only Megatron's local "
            "layers can be emulated; drop one of the two"
        )
    if arguments.has(argv, "--transformer-impl"):
        return argv, []
    # The fused softmax of Megatron's attention is a module of apex.
    return argv, [
        "--no-masked-softmax-fusion", "--transformer-impl", "local", "--no-persist-layer-norm"
    ]  # fmt: skip


def for_cpu(argv: Sequence[str], options: frozenset[str]) -> tuple[list[str], str]:
    """Return the same command for a machine without a GPU, and one line saying what changed."""
    out = list(argv)
    changed: list[str] = []
    for flag, takes_value in CPU_DROPPED.items():
        if arguments.has(out, flag):
            out = arguments.without(out, flag, takes_value)
            changed.append(f"-{flag}")
    for flag, wanted in CPU_VALUES.items():
        if flag in options and arguments.value(out, flag) != wanted:
            out = [*arguments.without(out, flag, takes_value=True), flag, wanted]
            changed.append(f"{flag} {wanted}")
    for flag in CPU_SWITCHES:
        if flag in options and not arguments.has(out, flag):
            out.append(flag)
            changed.append(flag)
    return out, f"on the CPU Megatron runs with {' '.join(changed) or 'the flags as written'}"
