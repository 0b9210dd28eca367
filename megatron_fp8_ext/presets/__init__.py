"""Presets: the reference's training runs as data, every setting with its origin.

A preset is a YAML file in this folder. `extends:` names the family (or preset) whose settings it starts
from; `NAME-bf16` is derived from every preset, for comparison. Scalars stay exactly as written (`1e-4`
is text, as on a command line).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_fp8_ext.errors import UserError, unknown_name
from megatron_fp8_ext.presets import yaml_file

Trainer = Literal["megatron", "slime"]
STAGES = ("cpt", "cpt-decay", "sft", "rl")
ORIGINS = ("paper", "reference", "correction", "derived", "ours", "user")
SECTIONS = ("settings", "slime", "megatron", "environment", "run")
RUN_KEYS = ("nodes", "gpus-per-node", "trainer")
_TEXTS = ("extends", "stage", "summary", "model", "experiment", "script", "source")
_FOLDER = Path(__file__).parent
_BF16 = "-bf16"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting.

    Attributes:
        value: its text; `true` is a switch that is written, `false` one that is not. `{name}` stands
            for an input of the run.
        origin: one of ORIGINS.
        note: what a reader should know; corrections always have one.
        when: the setting applies only if this input is given.
    """

    value: str
    origin: str
    note: str = ""
    when: str | None = None


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named run.

    Attributes:
        name: its name on the command line.
        summary: one line.
        stage: one of STAGES.
        model: name of the released model it was written for, a key of models.yaml.
        experiment: name of the output folder under exp/, as in the reference.
        script: the reference's script, relative to its repository.
        source: paper and folder.
        sections: settings by section, then by Megatron's flag name without its dashes. `settings`
            holds what both trainers take, `slime` and `megatron` what one of them takes, `run` and
            `environment` what is no flag.
        dropped: settings of the reference that are left out, and why.
    """

    name: str
    summary: str
    stage: str
    model: str
    experiment: str
    script: str
    source: str
    sections: Mapping[str, Mapping[str, Setting]]
    dropped: Mapping[str, str]

    def flags(self, trainer: str) -> dict[str, Setting]:
        """Return the settings that become flags for `trainer`."""
        return {**self.sections["settings"], **self.sections[trainer]}


def names() -> tuple[str, ...]:
    """Return the names of all presets, the BF16 twins included."""
    own = sorted(path.stem for path in _FOLDER.glob("*.yaml") if path.stem != "models")
    return tuple(name for each in own for name in (each, each + _BF16))


def get(name: str) -> Preset:
    """Return a preset by name, or from the path of a YAML file.

    Raises:
        UserError: unknown name (with the nearest known one), or a file that is no preset.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{name} does not exist; `megatron-fp8 list presets` names the presets")
        return _build(path.stem, path)
    if name not in names():
        raise unknown_name("preset", name, names())
    if name.endswith(_BF16):
        return _bf16_twin(get(name.removesuffix(_BF16)))
    return _build(name, _FOLDER / f"{name}.yaml")


def model_facts(model: str) -> dict[str, Any]:
    """Return what config.json of a released model says, as JSON types, or nothing if it is not known."""
    facts = yaml_file.read(_FOLDER / "models.yaml").get(model, {})
    return {key: _from_json(str(value)) for key, value in facts.items()}


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def known_keys() -> frozenset[str]:
    """Return every key that some preset sets: what `--set` and a user's file may name."""
    found = set(RUN_KEYS)
    for name in names():
        preset = get(name)
        for section in ("settings", "slime", "megatron"):
            found.update(preset.sections[section])
    return frozenset(found)


def _bf16_twin(base: Preset) -> Preset:
    settings = dict(base.sections["settings"])
    settings["fp8-recipe"] = Setting(
        value="bf16", origin="ours", note="everything else equal, for comparison"
    )
    return dataclasses.replace(
        base,
        name=base.name + _BF16,
        summary=base.summary + ", in BF16",
        experiment=base.experiment.replace("FP8", "BF16"),
        script="",
        sections={**base.sections, "settings": settings},
    )


def _build(name: str, path: Path) -> Preset:
    merged = _merged(path, ())
    missing = [key for key in ("stage", "model", "experiment") if key not in merged["texts"]]
    if missing:
        raise UserError(
            f"{path}: a preset needs {' and '.join(missing)}, or extends: NAME of a preset that has it"
        )
    texts = merged["texts"]
    if texts["stage"] not in STAGES:
        raise UserError(f"{path}: stage '{texts['stage']}' is none of {', '.join(STAGES)}")
    return Preset(
        name=name,
        summary=texts.get("summary", ""),
        stage=texts["stage"],
        model=texts["model"],
        experiment=texts["experiment"],
        script=texts.get("script", ""),
        source=texts.get("source", ""),
        sections={section: merged[section] for section in SECTIONS},
        dropped=merged["dropped"],
    )


def _merged(path: Path, above: tuple[Path, ...]) -> dict[str, dict[str, Any]]:
    """Return the file's sections over those of the file that it extends."""
    if path in above:
        raise UserError(f"{path} extends itself: {' -> '.join(p.stem for p in (*above, path))}")
    data = yaml_file.read(path)
    allowed = (*_TEXTS, *SECTIONS, "dropped")
    for key in data:
        if key not in allowed:
            raise unknown_name(f"key in {path}:", key, allowed)
    base: dict[str, dict[str, Any]] = {key: {} for key in ("texts", "dropped", *SECTIONS)}
    if "extends" in data:
        base = _merged(_find(str(data["extends"]), path), (*above, path))
    base["texts"].update({key: str(data[key]) for key in _TEXTS if key in data})
    base["dropped"].update(yaml_file.mapping(data, "dropped", path))
    for section in SECTIONS:
        for key, raw in yaml_file.mapping(data, section, path).items():
            if raw == "null":
                base[section].pop(key, None)
            else:
                base[section][key] = setting(raw, f"{path}: {section}: {key}")
    return base


def _find(name: str, where: Path) -> Path:
    for folder in (where.parent, _FOLDER, _FOLDER / "families"):
        found = folder / f"{name}.yaml"
        if found.is_file() and found != where:
            return found
    families = [path.stem for path in (_FOLDER / "families").glob("*.yaml")]
    raise unknown_name(f"preset in {where}: extends:", name, (*names(), *families))


def setting(raw: Any, where: str, origin: str | None = None) -> Setting:
    """Return the setting that a YAML value describes: a scalar, or a mapping with `value`.

    Raises:
        UserError: names the place and what is wrong.
    """
    if not isinstance(raw, dict):
        raw = {"value": raw}
    known = ("value", "origin", "note", "when")
    for key in raw:
        if key not in known:
            raise unknown_name(f"key in {where}:", key, known)
    value = raw.get("value")
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        value = " ".join(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: write one value (or a list of them), not {value!r}")
    found = origin or raw.get("origin", "user")
    if found not in ORIGINS:
        raise unknown_name(f"origin in {where}:", found, ORIGINS)
    if found == "correction" and not raw.get("note"):
        raise UserError(f"{where}: a correction needs a note that says why")
    return Setting(value=value, origin=found, note=raw.get("note", ""), when=raw.get("when"))
