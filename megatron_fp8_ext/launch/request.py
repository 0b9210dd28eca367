"""What the user asked for: a preset, inputs, and changes to it, in their order of precedence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_fp8_ext import presets
from megatron_fp8_ext.errors import UserError, unknown_name
from megatron_fp8_ext.launch.secrets import is_secret
from megatron_fp8_ext.presets import Preset, Setting, yaml_file

Launcher = Literal["torchrun", "slurm", "ray"]
LAUNCHERS: tuple[Launcher, ...] = ("torchrun", "slurm", "ray")
INPUTS = ("data", "model", "init", "output", "eval-data")


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What an sbatch file needs to know of the cluster.

    Attributes:
        minutes: time limit of one job; a run that is not done by then is requeued.
        partition: partition; None for the cluster's default.
        account: account; None for the user's default.
        container: image for `srun --container-image` (pyxis); None to run on the node itself.
    """

    minutes: int = 24 * 60
    partition: str | None = None
    account: str | None = None
    container: str | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """One run as asked for.

    Attributes:
        preset: where it starts.
        inputs: values of INPUTS that were given.
        overrides: changed settings, by key.
        environment: changed or added variables.
        extra: flags written after `--`; they win over everything.
        launcher: how to start; None for the trainer's own (torchrun for Megatron, ray for slime).
        rdzv_endpoint: HOST:PORT where the nodes of one torchrun job meet.
        ray_address: dashboard of a running Ray cluster; None starts a local one on loopback.
        megatron: a Megatron-LM checkout whose pretrain_gpt.py is to run; None for our entry script.
        slime: a slime checkout.
        from_scratch: random weights are meant.
        slurm: options of the sbatch file.
    """

    preset: Preset
    inputs: Mapping[str, str] = field(default_factory=dict)
    overrides: Mapping[str, Setting] = field(default_factory=dict)
    environment: Mapping[str, Setting] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    launcher: Launcher | None = None
    rdzv_endpoint: str | None = None
    ray_address: str | None = None
    megatron: str | None = None
    slime: str | None = None
    from_scratch: bool = False
    slurm: SlurmOptions = SlurmOptions()


def with_config(request: Request, path: Path) -> Request:
    """Return the request changed by a user's YAML file: settings, inputs and `environment:`.

    Raises:
        UserError: unknown key (with the nearest known one), or a secret in the file.
    """
    data = yaml_file.read(path)
    inputs, overrides = dict(request.inputs), dict(request.overrides)
    environment = dict(request.environment)
    for key, raw in data.items():
        where = f"{path}: {key}"
        if key == "environment":
            for name, value in yaml_file.mapping(data, key, path).items():
                if is_secret(name):
                    raise UserError(
                        f"{where}: {name}: secrets do not belong into a file; export it in the "
                        "shell, from where the run inherits it"
                    )
                environment[name] = presets.setting(value, f"{where}: {name}", "user")
        elif key in INPUTS:
            inputs[key] = presets.setting(raw, where, "user").value
        else:
            _known(key, f"key in {path}:", (*INPUTS, "environment"))
            overrides[key] = presets.setting(raw, where, "user")
    return dataclasses.replace(request, inputs=inputs, overrides=overrides, environment=environment)


def with_set(request: Request, assignments: Sequence[str]) -> Request:
    """Return the request changed by `--set KEY=VALUE`s.

    Raises:
        UserError: not of that form, or an unknown key (with the nearest known one).
    """
    overrides = dict(request.overrides)
    for text in assignments:
        key, equals, value = text.partition("=")
        key = key.strip().removeprefix("--")
        if not equals or not key:
            raise UserError(f"--set {text}: write it as --set key=value")
        _known(key, "--set key", ())
        overrides[key] = Setting(value=value.strip(), origin="user", note="--set")
    return dataclasses.replace(request, overrides=overrides)


# Settings that come from config.json, and may be overridden like any other.
ARCHITECTURE_KEYS = (
    "num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "group-query-attention",
    "num-query-groups", "kv-channels", "disable-bias-linear", "add-qkv-bias", "qk-layernorm",
    "normalization", "norm-epsilon", "swiglu", "position-embedding-type", "rotary-percent",
    "rotary-base", "untie-embeddings-and-output-weights", "padded-vocab-size", "vocab-size",
)  # fmt: skip


def _known(key: str, what: str, more: Sequence[str]) -> None:
    known = {*presets.known_keys(), *ARCHITECTURE_KEYS, *more}
    if key not in known:
        error = str(unknown_name(what, key, known)).split(" known: ")[0].rstrip(": ")
        raise UserError(
            f"{error} `megatron-fp8 show PRESET` lists the keys; a Megatron flag that no preset "
            "has goes after --"
        )
