"""patches/README.md has one record for each upstream symbol that is replaced, and no other."""

from __future__ import annotations

import os
import re

import pytest
from conftest import ROOT

from megatron_fp8_ext.megatron_plugin.patches import PATCHES

pytest.importorskip("torch", reason="the patches import it")
PAGE = ROOT / "patches" / "README.md"
HEAD = "| module | symbol | when | Megatron | why | delete when |\n|---|---|---|---|---|---|\n"


def records() -> str:
    return "".join(
        f"| `{p.module}` | `{p.symbol}` | {p.when} | {p.versions} | {p.reason} | {p.delete_when} |\n"
        for p in PATCHES
    )


def test_the_records_are_those_of_the_code():
    text = PAGE.read_text()
    before, after = text.split(HEAD)
    rows = re.match(r"(?:\|.*\n)*", after).group(0)
    if os.environ.get("UPDATE_RECORDS"):
        PAGE.write_text(before + HEAD + records() + after[len(rows) :])
        return
    assert rows == records(), "UPDATE_RECORDS=1 writes them anew"


def test_every_record_says_why_and_until_when():
    assert len({(p.module, p.symbol, p.when) for p in PATCHES}) == len(PATCHES)
    for patch in PATCHES:
        assert patch.reason and patch.delete_when and re.fullmatch(r"0\.\d+-0\.\d+", patch.versions)


def test_every_symbol_replaced_in_slime_has_a_record():
    """Whatever slime_plugin assigns to a module of slime's stands in the table, and nothing else."""
    rows = PAGE.read_text().split("## slime")[1].split("## Source patches")[0]
    source = "".join(p.read_text() for p in (ROOT / "megatron_fp8_ext/slime_plugin").glob("*.py"))
    replaced = set(re.findall(r"^ +(?:module|place)\.(\w+) = ", source, re.MULTILINE))
    assert replaced == set(re.findall(r"^\| `.*?\| `(\w+)` \|", rows, re.MULTILINE))
