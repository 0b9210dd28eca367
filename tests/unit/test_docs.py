"""The docs say what the code does."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib
import typer
from conftest import ROOT
from typer.testing import CliRunner

from megatron_fp8_ext import presets
from megatron_fp8_ext.cli import app
from megatron_fp8_ext.launch import plan, request, start
from megatron_fp8_ext.megatron_plugin.refusals import REFUSALS, WITHOUT_EFFECT

PAGES = [
    ROOT / "README.md",
    ROOT / "README_zh.md",
    ROOT / "docker/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.flag)
def test_every_refusal_stands_in_the_table(row):
    when = {"everywhere": "always", "emulated": "without a GPU", "gpu": "on a GPU"}[row.where]
    shown = f"`{row.flag}`" + (f" (but `{'`, `'.join(row.allowed)}`)" if row.allowed else "")
    line = f"| {shown} | {when} | {row.reason} | {row.mend} |"
    assert line in (ROOT / "docs" / "flags.md").read_text().splitlines()


def test_flags_without_effect_are_named():
    text = (ROOT / "docs" / "flags.md").read_text()
    assert all(f"`{flag}`" in text for flag in WITHOUT_EFFECT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        if "://" in target:
            continue
        place = page.parent / target if target else page
        assert place.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)", place.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{page.name}: {target}#{anchor}"


def test_every_stage_and_topic_has_its_page():
    topics = (
        "quickstart", "pipeline", "cpt", "sft", "rl", "conversion", "evaluation", "recipe", "performance",
        "writing-a-recipe", "troubleshooting", "migration", "running", "schedule", "proof", "flags",
    )  # fmt: skip
    for topic in topics:
        assert (ROOT / "docs" / f"{topic}.md").is_file(), topic


# One thread of each of the ten pains that users of FP8 training report.
PAINS = (
    "slime #848", "TransformerEngine #2393", "Megatron-LM #2582", "verl #7232", "Megatron-LM #1350",
    "sglang #4791", "sglang #13067", "slime #1679", "slime #967", "slime #535",
)  # fmt: skip


@pytest.mark.parametrize("thread", PAINS)
def test_every_pain_has_its_symptom(thread):
    repository, number = thread.split()
    rows = (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
    assert any(re.search(rf"{repository} #[^;)]*{number}\b|{thread}\b", row) for row in rows)


def commands() -> list[str]:
    """Every command of every shell block, on one line, without its comment."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh|shell)\n(.*?)```", page.read_text(), re.DOTALL):
            joined = re.sub(r" +", " ", block.replace("\\\n", " "))
            lines = (re.sub(r"(^| )#.*", "", line).strip() for line in joined.splitlines())
            found += [line for line in lines if line and not re.fullmatch(r"[A-Z_]+=\S*", line)]
    return sorted(set(found))


def of(*starts: str) -> list[str]:
    return [command for command in commands() if command.startswith(starts)]


OURS, SCRIPTS = of("megatron-fp8 "), [c for c in commands() if "bash scripts/" in c]
TRAINING = [c for c in commands() if "pretrain_gpt.py" in c and c not in OURS]
REST = sorted({*commands()} - {*OURS, *SCRIPTS, *TRAINING})


def resolved(words: list[str]) -> Any:
    """Parse words as the command line does: unknown commands, options and values fail here."""
    command, context = typer.main.get_command(app), None
    words = words[1:]
    while True:
        context = command.make_context(command.name, list(words), parent=context)
        if not hasattr(command, "resolve_command"):
            return context
        rest = [*context._protected_args, *context.args]
        if not rest:
            return context
        _, command, words = command.resolve_command(context, rest)


@pytest.mark.parametrize("command", OURS)
def test_our_commands_parse(command):
    resolved(shlex.split(command))


# These start nothing, so that they can be run as they stand; `run` with --dry-run.
HARMLESS = ("run", "list", "show", "expand", "schedule", "rl")


@pytest.mark.parametrize("command", [c for c in OURS if c.split()[1] in HARMLESS])
def test_our_commands_resolve(command, tmp_path, monkeypatch):
    words = shlex.split(command)[1:]
    if words[0] == "run" and "--dry-run" not in words:
        at = words.index("--") if "--" in words else len(words)
        words.insert(at, "--dry-run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["megatron-fp8", *words])
    if "mine.yaml" in words:
        (block,) = re.findall(
            r"```yaml\n(.*?)```", (ROOT / "docs/running.md").read_text(), re.DOTALL
        )
        Path("mine.yaml").write_text(block)
    if "--after" in words:
        _earlier(Path(words[words.index("--after") + 1]))
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "/path/to/data" not in done.output or "--data" not in words


def _earlier(folder: Path) -> None:
    """The record of the stage before, as a run of it leaves it."""
    names = {presets.get(name).experiment: name for name in presets.names()}
    inputs = {
        "model": "MODEL",
        "init": "STABLE/iter_0035000",
        "data": "DATA",
        "output": str(folder),
    }
    asked = request.Request(preset=presets.get(names[folder.name]), inputs=inputs)
    folder.mkdir(parents=True)
    (folder / start.RECORD).write_text(start.record(plan.build(asked, plan.Facts())))


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands_expand(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare = re.sub(r"<[^>]*>|\$\([^)]*\)|\.\.\.", " ", command)
    flags = re.split(r"pretrain_gpt\.py", bare, maxsplit=1)[1]
    if "--wsd-decay-from" in flags:
        pytest.skip("reads a checkpoint; tests/megatron/test_branches.py trains with it")
    words = ["expand", "--", "--bf16", *shlex.split(flags)]
    if "--lr-schedule" in flags:
        words += ["--train-iters", "40000"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0 and "--bf16" in done.output, done.output


@pytest.mark.parametrize("command", SCRIPTS)
def test_scripts_resolve(command):
    assert command.endswith("--dry-run"), "a script in the docs starts nothing by itself"
    shim = f'megatron-fp8() {{ "{sys.executable}" -m megatron_fp8_ext.cli "$@"; }}; export -f megatron-fp8; '
    before, _, script = command.partition("bash ")
    path, *arguments = shlex.split(script)
    body = (ROOT / path).read_text().replace("exec megatron-fp8", "megatron-fp8")
    variables = dict(word.split("=", 1) for word in shlex.split(before))
    done = subprocess.run(
        ["bash", "-c", shim + body, path, *arguments], capture_output=True, text=True, cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **variables},
    )  # fmt: skip
    assert done.returncode == 0 and "torchrun" in done.stdout, done.stderr


# What slime's code imports (docs/rl.md); all else that the docs install is ours.
SLIME_S_OWN = ('pip install "numpy<2" "ray[default]"', "pip install --no-deps sglang==")


@pytest.mark.parametrize("command", REST)
def test_the_other_commands_name_what_there_is(command):
    words = [word for word in shlex.split(command) if "=" not in word]
    if words in ([], ["export"]):
        return  # variables for the next line
    if words[:2] == ["pip", "install"]:
        extras = re.findall(r"megatron-fp8-ext\[(.*?)\]", command)
        with (ROOT / "pyproject.toml").open("rb") as file:
            known = tomllib.load(file)["project"]["optional-dependencies"]
        assert "megatron-fp8-ext" in command or command.startswith(SLIME_S_OWN)
        assert all(e in known for x in extras for e in x.split(","))
    elif words[:3] in (["python", "-m", "rl_loop.loop"], ["python", "-m", "rl_loop.sft"]):
        module = ROOT / "tests" / "slime" / words[2].replace(".", "/")
        assert module.with_suffix(".py").is_file()
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif "pytest" in words[:3]:
        assert all(
            (ROOT / word.split("::")[0]).exists() for word in words if word.startswith("tests")
        )
    else:  # slime's own scripts, by our launcher or by our dotted paths
        script = words[1]
        assert words[0] in ("python", "python3") and script.endswith(".py"), (
            "test this kind of command"
        )
        assert script in ("train.py", "train_async.py") or (ROOT / script).is_file()
        for path in re.findall(r"megatron_fp8_ext\.slime_plugin\.(\w+)", command):
            assert path in (ROOT / "megatron_fp8_ext/slime_plugin/__init__.py").read_text()
