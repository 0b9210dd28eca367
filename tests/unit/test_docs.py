"""The docs say what the code does."""

from __future__ import annotations

import re
import shlex

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from megatron_fp8_ext.cli import app
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
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def commands() -> list[str]:
    """Every `megatron-fp8 ...` line of a shell block."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            joined = block.replace("\\\n", " ")
            found += [x.strip() for x in joined.splitlines() if x.startswith("megatron-fp8 ")]
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_commands_are_known(command):
    """Each command's words parse: an unknown command or option fails here."""
    words = shlex.split(command, comments=True)[1:]
    names = []
    group = app
    for word in words:
        if word.startswith("-") or group is None:
            break
        default = getattr(group.info.cls, "default", None)
        if default and word not in {c.callback.__name__ for c in group.registered_commands}:
            word = default  # `eval aime24` means `eval run aime24`
        names.append(word)
        sub = {g.name: g.typer_instance for g in group.registered_groups}.get(word)
        if sub is None:
            known = {c.name or c.callback.__name__.rstrip("_") for c in group.registered_commands}
            assert word in known, command
        group = sub
    shown = CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    for word in words[len(names) :]:
        if word == "--":
            break
        if word.startswith("--"):
            assert word.split("=")[0] in shown.output, command
