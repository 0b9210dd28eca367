"""The habits of the reference's scripts, translated: their arguments, their variables, their paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.launch.request import Request
from megatron_fp8_ext.presets import Setting

# Variables that a user of the reference edits at the top of a script: here read from the environment.
VARIABLES: dict[str, str] = {
    "DATA_PATH": "data",
    "DATA_DIR": "data",
    "TOKENIZER_MODEL": "model",
    "HF_CHECKPOINT": "model",
    "REF_LOAD": "init",
    "SAVE_DIR": "save",
    "CHECKPOINT_PATH": "save",
    "LOAD_DIR": "load",
    "DATA_CACHE_PATH": "data-cache-path",
    "CODE_DIR": "megatron",
    "HOME_DIR": "slime",
}
# Arguments that the scripts take, in all spellings found in their docs.
_ARGUMENTS: dict[str, str] = {
    "--nnodes": "nodes",
    "--actor-num-nodes": "nodes",
    "--actor-num-gpus-per-node": "gpus-per-node",
    "--rdzv_endpoint": "rdzv",
    "--rdzv-endpoint": "rdzv",
    "--load": "load",
}


@dataclass(frozen=True)
class Translated:
    """The request, and lines that say what was read differently."""

    request: Request
    notes: tuple[str, ...]


def translate(request: Request, tokens: Sequence[str], environ: Mapping[str, str]) -> Translated:
    """Apply a reference script's variables and arguments; the rest are Megatron flags.

    Raises:
        UserError: an argument without its value.
    """
    found = {key: environ[name] for name, key in VARIABLES.items() if environ.get(name)}
    extra: list[str] = []
    notes: list[str] = []
    words = iter(tokens)
    for token in words:
        flag, equals, value = token.partition("=")
        if flag not in _ARGUMENTS:
            extra.append(token)
            continue
        value = value if equals else next(words, "")
        if not value:
            raise UserError(f"{flag} needs a value")
        found[_ARGUMENTS[flag]] = value
    overrides = dict(request.overrides)
    for key in ("nodes", "gpus-per-node", "save", "data-cache-path"):
        if key in found:
            overrides[key] = Setting(value=found[key], origin="user", note="script")
    stage = request.preset.stage
    own = found.get("save", f"exp/{request.preset.experiment}/checkpoints")
    if "save" in found and stage != "cpt-decay":
        overrides["load"] = Setting(value=own, origin="user", note="script")
    load = found.get("load")
    if load is not None and load.rstrip("/") != own.rstrip("/"):
        if stage.startswith("cpt"):
            found["init"] = load
            notes.append(
                f"--load {load} is read as --init: the run resumes from its own folder, {own}"
            )
        else:
            overrides["load"] = Setting(value=load, origin="user", note="LOAD_DIR")
    inputs: dict[str, str] = {k: found[k] for k in ("data", "model", "init") if k in found}
    changed = dataclasses.replace(
        request,
        inputs={**inputs, **request.inputs},
        overrides={**overrides, **request.overrides},
        extra=(*extra, *request.extra),
        rdzv_endpoint=request.rdzv_endpoint or found.get("rdzv"),
        megatron=request.megatron or found.get("megatron"),
        slime=request.slime or found.get("slime"),
    )
    return Translated(changed, tuple(notes))
