"""Settings to flags: preset < user's YAML < --set < flags after `--`. Pure, without torch.

What comes out is Megatron's or slime's own flags plus our one `--fp8-recipe`, which our entry scripts expand.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_fp8_ext import presets
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.launch import architecture
from megatron_fp8_ext.launch.request import Launcher, Request
from megatron_fp8_ext.megatron_plugin import arguments
from megatron_fp8_ext.megatron_plugin.flags import NATIVE_RECIPES
from megatron_fp8_ext.presets import Setting
from megatron_fp8_ext.recipe import FP8Recipe, get_recipe

_ITERATION = re.compile(r"(?:(.*)/)?iter_(\d+)/?")
# What an argparse negative number looks like, so that `-1` is a value and `--x` a flag.
_FLAG = re.compile(r"--[A-Za-z]")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the plan needs to know of the world.

    Attributes:
        config: config.json of `--model`; None where it cannot be read.
        saved_iteration: iteration of the run's own last checkpoint; None before the first.
        init_iteration: iteration of the last checkpoint under `--init`; None if unknown.
        slime: folder of slime's train.py, found by itself; None where there is none.
        secrets: values of the environment that must not be shown.
    """

    config: Mapping[str, Any] | None = None
    saved_iteration: int | None = None
    init_iteration: int | None = None
    slime: str | None = None
    secrets: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, ready to be rendered for a launcher.

    Attributes:
        request: what was asked for.
        settings: the settings that became flags, with resolved values, in order.
        trainer: `megatron` or `slime`.
        launcher: how it starts.
        nodes: number of nodes.
        gpus: GPUs of each node.
        output: its folder.
        save: folder of its checkpoints.
        recipe: the FP8 recipe; None if the user wrote one of Megatron's own.
        flags: every flag but those of `start` and `resume`.
        start: flags of the first start.
        resume: flags that take their place once the run has a checkpoint of its own.
        environment: variables.
        config: the model's config.json, or what is known of the released model.
        missing: inputs that were not given, by placeholder.
        notes: lines for the user.
    """

    request: Request
    settings: Mapping[str, Setting]
    trainer: str
    launcher: Launcher
    nodes: int
    gpus: int
    output: str
    save: str
    recipe: FP8Recipe | None
    flags: tuple[str, ...]
    start: tuple[str, ...]
    resume: tuple[str, ...]
    environment: Mapping[str, str]
    config: Mapping[str, Any]
    missing: Mapping[str, str]
    notes: tuple[str, ...]
    facts: Facts

    @property
    def argv(self) -> tuple[str, ...]:
        """The flags of the next start."""
        return (*self.flags, *(self.start if self.facts.saved_iteration is None else self.resume))

    def value(self, flag: str, default: str = "") -> str:
        """Return the value of a flag in the final command."""
        return arguments.value(self.argv, flag) or default

    def number(self, flag: str, default: int = 1) -> int:
        """Return a flag's whole number.

        Raises:
            UserError: it is not one.
        """
        text = arguments.value(self.argv, flag)
        try:
            return default if text is None else int(text)
        except ValueError:
            raise UserError(f"{flag} {text}: write a whole number") from None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus

    @property
    def slime(self) -> str | None:
        """The slime checkout: the one that was asked for, or the one that was found."""
        return self.request.slime or self.facts.slime


def split_checkpoint(path: str) -> tuple[str, int | None]:
    """Return (root, iteration) of a checkpoint path; the iteration is None for a root."""
    match = _ITERATION.fullmatch(path)
    return (match.group(1) or ".", int(match.group(2))) if match else (path, None)


def build(request: Request, facts: Facts) -> Plan:
    """Turn a request into a plan.

    Raises:
        UserError: values that no run could have (a trainer that is not known, nodes below one).
    """
    preset = request.preset
    notes: list[str] = []
    run = {k: v for k, v in preset.sections["run"].items()}
    run |= {k: v for k, v in request.overrides.items() if k in presets.RUN_KEYS}
    trainer = run["trainer"].value
    if trainer not in ("megatron", "slime") or (preset.stage == "rl" and trainer != "slime"):
        allowed = "slime" if preset.stage == "rl" else "megatron or slime"
        raise UserError(f"trainer '{trainer}': {preset.name} trains with {allowed}")
    nodes, gpus = _positive(run, "nodes"), _positive(run, "gpus-per-node")
    settings = _merged(request, trainer)
    extra, settings = _over(request.extra, settings, notes)

    output = request.inputs.get("output", f"exp/{preset.experiment}")
    names = {**request.inputs, "output": output, "nodes": str(nodes), "gpus-per-node": str(gpus)}
    if preset.stage == "cpt-decay":
        names |= _branch(request, facts)
    settings = {k: s for k, s in settings.items() if s.when is None or s.when in names}
    missing: dict[str, str] = {}
    settings = {
        key: dataclasses.replace(s, value=_resolve(s.value, names, settings, missing))
        for key, s in settings.items()
    }
    known = presets.model_facts(preset.model)
    config = facts.config if facts.config is not None else known
    if config:
        tp = (
            arguments.value(extra, "--tensor-model-parallel-size")
            or settings["tensor-model-parallel-size"].value
            if "tensor-model-parallel-size" in settings
            else "1"
        )
        shape = architecture.flags(config, _whole("tensor-model-parallel-size", tp))
        if trainer == "slime":
            shape["vocab-size"] = str(config["vocab_size"])  # slime cuts the padding off with it
        derived = {
            key: Setting(value=value, origin="derived", note="config.json")
            for key, value in shape.items()
            if not arguments.has(extra, f"--{key}")
        }
        own = {k: s for k, s in settings.items() if k in derived}
        settings = {**derived, **settings, **own}
    if facts.config is None and known and "model" not in missing:
        notes.append(
            f"architecture from what is known of {preset.model}; --model decides once it is there"
        )
    if facts.config is not None and known:
        differs = architecture.differences(facts.config, known)
        if differs:
            notes.append(
                f"--model is not {preset.model}, for which {preset.name} was written: "
                f"{', '.join(differs)}; check parallel sizes and learning rate"
            )

    recipe, recipe_flags = _precision(settings, extra)
    start, resume = _start(settings, preset.stage)
    shown = {k: s for k, s in settings.items() if k not in ("load", "ckpt-step", "fp8-recipe")}
    flags = (
        *(token for k, s in shown.items() for token in to_flag(k, s.value)),
        *recipe_flags,
        *extra,
    )
    environment: dict[str, str] = {}
    for section in (preset.sections["environment"], request.environment):
        found = {n: _resolve(s.value, names, settings, missing) for n, s in section.items()}
        environment = {**environment, **found}
    if recipe is not None:
        environment = {**environment, **recipe.environment}
    launcher = request.launcher or ("ray" if trainer == "slime" else "torchrun")
    if (trainer, launcher) in (("megatron", "ray"), ("slime", "torchrun")):
        right = "ray" if trainer == "slime" else "torchrun"
        raise UserError(
            f"--launcher {launcher}: {preset.name} trains with {trainer}; use --launcher {right} or slurm"
        )
    for flag, value, reader in (
        ("--ray-address", request.ray_address, "ray"),
        ("--rdzv-endpoint", request.rdzv_endpoint, "torchrun"),
    ):
        if value and launcher != reader:
            notes.append(f"{flag} is for --launcher {reader}, and left out here")
    save = arguments.value(flags, "--save") or f"{output}/checkpoints"
    return Plan(
        request=request, settings=settings, trainer=trainer, launcher=launcher, nodes=nodes, gpus=gpus,
        output=output, save=save, recipe=recipe, flags=flags, start=start, resume=resume,
        environment=environment, config=config, missing=missing, notes=tuple(notes), facts=facts,
    )  # fmt: skip


def to_flag(key: str, value: str) -> list[str]:
    """Return the tokens of one setting: `true` is a switch, `false` is nothing."""
    if value == "false":
        return []
    return [f"--{key}"] if value == "true" else [f"--{key}", *value.split()]


def _merged(request: Request, trainer: str) -> dict[str, Setting]:
    """The preset's flags under the user's changes; each keeps the preset's note and its place."""
    settings = request.preset.flags(trainer)
    for key, new in request.overrides.items():
        if key in presets.RUN_KEYS:
            continue
        old = settings.get(key)
        note = f"the preset says {old.value}" if old is not None else ""
        settings[key] = dataclasses.replace(new, note=note)
    return settings


def _over(
    extra: tuple[str, ...], settings: dict[str, Setting], notes: list[str]
) -> tuple[tuple[str, ...], dict[str, Setting]]:
    """Take settings out that the flags after `--` write anew."""
    written = {token[2:].split("=")[0] for token in extra if _FLAG.match(token)}
    replaced = [key for key in settings if key in written]
    if replaced:
        notes.append("replaced by your flags: " + " ".join(f"--{key}" for key in replaced))
    return extra, {key: s for key, s in settings.items() if key not in written}


def _branch(request: Request, facts: Facts) -> dict[str, str]:
    """The inputs of a decay run: the stable run's checkpoints, and the step to branch at."""
    if "init" not in request.inputs:
        return {}
    root, step = split_checkpoint(request.inputs["init"])
    step = step if step is not None else facts.init_iteration
    return {"branch": root} | ({"branch-step": str(step)} if step else {})


_FLAG_OF = {
    "data": "--data", "model": "--model", "init": "--init", "branch": "--init",
    "branch-step": "--init", "eval-data": "--eval-data",
}  # fmt: skip


def _resolve(
    text: str, names: Mapping[str, str], settings: Mapping[str, Setting], missing: dict[str, str]
) -> str:
    """Fill `{name}` in; a sum of names is computed. What is missing becomes a placeholder."""

    def fill(match: re.Match[str]) -> str:
        parts = match.group(1).split("+")
        found = []
        for part in parts:
            value = names.get(part, settings[part].value if part in settings else None)
            if value is None:
                missing[part] = _FLAG_OF.get(part, f"--set {part}=...")
                return f"/path/to/{match.group(1)}" if len(parts) == 1 else match.group(1).upper()
            found.append(value)
        return found[0] if len(found) == 1 else str(sum(_whole(match.group(1), v) for v in found))

    return re.sub(r"\{([a-z+-]+)\}", fill, text)


def _start(settings: Mapping[str, Setting], stage: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The flags that load a checkpoint: at the first start, and once the run has its own."""
    start = tuple(
        token
        for k in ("load", "ckpt-step")
        if k in settings
        for token in to_flag(k, settings[k].value)
    )
    if stage == "cpt-decay" and "save" in settings:
        return start, ("--load", settings["save"].value)
    return start, start


def _precision(
    settings: Mapping[str, Setting], extra: tuple[str, ...]
) -> tuple[FP8Recipe | None, tuple[str, ...]]:
    """The recipe and its one flag, which our entry scripts turn into native ones."""
    written = arguments.value(extra, "--fp8-recipe")
    name = written or settings["fp8-recipe"].value
    recipe = None if name in NATIVE_RECIPES else get_recipe(name)
    return recipe, () if written else ("--fp8-recipe", name)


def _positive(run: Mapping[str, Setting], key: str) -> int:
    number = _whole(key, run[key].value)
    if number < 1:
        raise UserError(f"{key}={number}: at least 1")
    return number


def _whole(key: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{key}={text}: write a whole number") from None
