"""`megatron-fp8 compare`: one training command x recipes x seeds -> members, each a whole command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fp8_ext import registry
from megatron_fp8_ext.errors import UserError, unknown_name
from megatron_fp8_ext.megatron_plugin import (
    arguments,
    flags,
    fused_flags,
    packed_flags,
    stats_flags,
)
from megatron_fp8_ext.recipe import get_recipe

BASELINE = "bf16"
MEGATRON_DEFAULT_SEED = 1234
RUN = "{run}"  # in a command: the name of the run's folder, RECIPE-seedN

# What a member has of its own; everything else of the command is common to all. Flag -> takes a value.
_OWN: dict[str, bool] = {
    flags.RECIPE: True,
    flags.EMULATE: False,
    flags.NO_PARAM_GATHER: False,
    stats_flags.INTERVAL: True,
    stats_flags.DIRECTORY: True,
    "--fp8-format": True,
    "--fp8-param-gather": False,
    "--seed": True,
    "--train-iters": True,
    "--save": True,
    "--tensorboard-dir": True,
}
# Taken out when a member goes on from its own checkpoint: they are for its first start.
_FIRST_START: dict[str, bool] = {
    "--load": True,
    "--ckpt-step": True,
    "--finetune": False,
    "--no-load-optim": False,
    "--no-load-rng": False,
    flags.MAIN_PARAMS: False,
    "--pretrained-checkpoint": True,
}
_NATIVE_FORMATS = {
    "delayed": "hybrid",
    "tensorwise": "hybrid",
    "mxfp8": "e4m3",
    "blockwise": "e4m3",
}
# Of our own recipes: what comes after the colon -> flags.
_OPTIONS = {
    "emulated": (flags.EMULATE,),
    "fused": (fused_flags.ON,),
    "unfused": (fused_flags.OFF,),
    "stash": (fused_flags.STASH,),
}


@dataclass(frozen=True)
class Choice:
    """One column of the comparison.

    Attributes:
        label: as written after `--recipes`.
        flags: what it adds to the command.
        is_fp8: whether it casts anything.
        control: whether it is meant to fail.
    """

    label: str
    flags: tuple[str, ...]
    is_fp8: bool
    control: bool


@dataclass(frozen=True)
class Member:
    """One run.

    Attributes:
        choice: its recipe.
        seed: value of `--seed`; runs with the same one share data order and start.
        steps: `--train-iters`.
        folder: where its log, state, statistics and checkpoints go.
        common: the part of the command that all members share.
        argv: its whole command, from the start.
        saves: whether it writes checkpoints that it can go on from.
    """

    choice: Choice
    seed: int
    steps: int
    folder: Path
    common: tuple[str, ...]
    argv: tuple[str, ...]
    saves: bool

    @property
    def name(self) -> str:
        """Name of its folder: recipe and seed."""
        return self.folder.name

    @property
    def checkpoints(self) -> Path:
        """Folder of its checkpoints."""
        return self.folder / "checkpoints"

    def resumed(self) -> tuple[str, ...]:
        """Return its command for going on from its own checkpoints."""
        argv: Sequence[str] = self.argv
        for flag, takes_value in _FIRST_START.items():
            argv = arguments.without(argv, flag, takes_value)
        return (*argv, "--load", str(self.checkpoints))


def choose(text: str) -> Choice:
    """Read one entry of `--recipes`: NAME, or NAME:OPTION.

    The option of our recipes is `emulated`, `fused` (our layers), `unfused` (TransformerEngine's) or `stash`
    (fc1's output kept in 8 bits); of Megatron's own (delayed, tensorwise, mxfp8, blockwise) the FP8 format,
    `e4m3` or `hybrid`. Negative controls are always emulated.

    Raises:
        UserError: unknown recipe or option.
    """
    name, _, option = text.partition(":")
    if name in _NATIVE_FORMATS:
        if option not in ("", "e4m3", "hybrid"):
            raise UserError(f"--recipes {text}: the option of {name} is e4m3 or hybrid")
        fp8_format = option or _NATIVE_FORMATS[name]
        return Choice(text, (flags.RECIPE, name, "--fp8-format", fp8_format), True, False)
    if name not in registry.names("recipe"):
        raise unknown_name(
            "recipe in --recipes", name, (*registry.names("recipe"), *_NATIVE_FORMATS)
        )
    recipe = get_recipe(name)
    known = ("emulated",) if recipe.control else tuple(_OPTIONS) if recipe.is_fp8 else ()
    if option and option not in known:
        only = f"has the options {', '.join(known)}" if known else "has no option"
        raise UserError(f"--recipes {text}: {name} {only}")
    added = _OPTIONS["emulated" if recipe.control else option] if option or recipe.control else ()
    return Choice(text, (flags.RECIPE, name, *added), recipe.is_fp8, recipe.control)


def plan(
    command: Sequence[str],
    recipes: Sequence[str],
    seeds: int,
    steps: int | None,
    output: Path,
    stats_interval: int | None = None,
) -> tuple[Member, ...]:
    """Return the members, all recipes of a seed before the next seed, so that pairs come early.

    Args:
        command: a training command with Megatron's flags, as a user types it; `{run}` in it is the
            name of each run's folder, so that a second stage can load what each run of a first one left.
        recipes: entries of `--recipes`; `bf16` is added in front where it is missing.
        seeds: how many: the command's own (or Megatron's 1234), and those after it.
        steps: iterations of each run; None takes the command's `--train-iters`.
        output: folder of all members.
        stats_interval: iterations between numerics samples; None for a tenth of the steps, at
            most 100.

    Raises:
        UserError: a recipe is unknown or named twice; the command has no length, a schedule that does
            not fit into it, or a flag that only some of the runs could take.
    """
    choices = [choose(entry) for entry in recipes]
    if BASELINE not in [choice.label for choice in choices]:
        choices.insert(0, choose(BASELINE))
    labels = [choice.label for choice in choices]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"--recipes names {label} twice; drop one")
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: at least 1 (2 for a verdict)")
    written = arguments.first_written(command, fused_flags.FLAGS)
    if written is not None:
        raise UserError(
            f"{written} is for FP8 runs alone: write infir2:fused, infir2:unfused or infir2:stash instead"
        )
    steps = _steps(command, steps)
    _check_schedule(command, steps)
    first_seed = int(arguments.value(command, "--seed") or MEGATRON_DEFAULT_SEED)
    interval = stats_interval or max(min(steps // 10, 100), 1)
    common = common_part(command)
    saves = arguments.has(command, "--save")
    events = arguments.has(command, "--tensorboard-dir")
    members = []
    for seed in range(first_seed, first_seed + seeds):
        for choice in choices:
            folder = output / f"{choice.label.replace(':', '-')}-seed{seed}"
            argv = [word.replace(RUN, folder.name) for word in common]
            argv += ["--train-iters", str(steps), "--seed", str(seed)]
            if not arguments.has(command, "--log-interval"):
                argv += ["--log-interval", "1"]
            if not arguments.has(command, "--log-throughput"):
                argv.append("--log-throughput")
            if saves:
                argv += ["--save", str(folder / "checkpoints")]
            if events:
                argv += ["--tensorboard-dir", str(folder / "tensorboard")]
            if choice.is_fp8:
                argv += [stats_flags.INTERVAL, str(interval), stats_flags.DIRECTORY, str(folder)]
            argv += choice.flags
            members.append(Member(choice, seed, steps, folder, common, tuple(argv), saves))
    return tuple(members)


def common_part(command: Sequence[str]) -> tuple[str, ...]:
    """Return the command without what each member has of its own."""
    for flag, takes_value in _OWN.items():
        command = arguments.without(command, flag, takes_value)
    return tuple(command)


def _steps(command: Sequence[str], steps: int | None) -> int:
    if arguments.has(command, "--train-samples"):
        raise UserError("compare counts in iterations: replace --train-samples by --steps N")
    if steps is None:
        written = arguments.value(command, "--train-iters")
        if written is None or not written.isdigit():
            raise UserError("how long? add --steps N, or --train-iters N to the command")
        steps = int(written)
    if steps < 1:
        raise UserError(f"--steps {steps}: at least 1")
    return steps


def _check_schedule(command: Sequence[str], steps: int) -> None:
    parts = {
        flag: int(written)
        for flag in ("--lr-warmup-iters", "--lr-wsd-decay-iters")
        if (written := arguments.value(command, flag)) is not None and written.isdigit()
    }
    if sum(parts.values()) > steps:
        shown = " + ".join(f"{flag} {value}" for flag, value in parts.items())
        raise UserError(f"{shown} is longer than --steps {steps}: shorten them in the command")


def input_folders(command: Sequence[str]) -> list[Path]:
    """Return the folders that the command reads: packed samples, and the checkpoint it starts from."""
    written = (arguments.value(command, flag) for flag in (packed_flags.DATA, "--load"))
    return [Path(word) for word in written if word is not None and Path(word).is_dir()]


def data_prefixes(command: Sequence[str]) -> list[Path]:
    """Return the prefixes of the corpora on the command line, without their weights."""
    words: list[str] = []
    for flag in ("--data-path", "--train-data-path"):
        for index, token in enumerate(command):
            if token.startswith(flag + "="):
                words.append(token[len(flag) + 1 :])
            elif token == flag:
                for word in command[index + 1 :]:
                    if word.startswith("--"):
                        break
                    words.append(word)
    return [Path(word) for word in words if Path(word + ".idx").is_file()]
