from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import EXAMPLE_PACKAGE, ROOT

from megatron_fp8_ext import registry
from megatron_fp8_ext.errors import UserError


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'wsd'"):
        registry.lookup("schedule", "wds")


def test_a_stranger_adds_a_recipe():
    done = subprocess.run(
        [sys.executable, "-m", "megatron_fp8_ext.cli", "list", "recipes"],
        env={"PYTHONPATH": f"{ROOT}:{EXAMPLE_PACKAGE}", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "acme-fp32" in done.stdout and "acme-fp8" in done.stdout
    shown = subprocess.run(
        [sys.executable, "-m", "megatron_fp8_ext.cli", "show", "acme-fp32"],
        env={"PYTHONPATH": f"{ROOT}:{EXAMPLE_PACKAGE}", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1" in shown.stdout


def test_a_broken_package_names_itself(tmp_path):
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[megatron_fp8_ext.fp8_recipes]\nbad = nowhere:X\n")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_fp8_ext.cli", "show", "bad"],
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "package 'broken' cannot be loaded" in done.stderr
