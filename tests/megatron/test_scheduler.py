"""schedule.WSD equals Megatron's scheduler bit for bit: megatron-core 0.17, 0.18, 0.19; core_v0.14.0."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import ROOT, megatron_lm, run

pytestmark = pytest.mark.megatron
SCRIPT = Path(__file__).with_name("scheduler_property.py")


def compare(megatron: Path) -> None:
    pytest.importorskip("hypothesis")
    outcome = run([sys.executable, "-W", "ignore", str(SCRIPT)], PYTHONPATH=f"{megatron}:{ROOT}")
    assert outcome.code == 0, outcome.output[-3000:]
    line = next(x for x in outcome.output.splitlines() if x.startswith("COMPARED"))
    assert int(line.split()[1]) > 1000 and str(megatron) in line


def test_equal_at_every_step(wheel):
    compare(wheel[1])


@pytest.mark.checkout
def test_equal_at_every_step_of_a_checkout():
    path = megatron_lm()
    compare(path)
