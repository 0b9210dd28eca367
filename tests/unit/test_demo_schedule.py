"""The picture of `megatron-fp8 demo schedule`, and what it refuses before it trains."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from test_cli import cli

from megatron_fp8_ext.demo import schedule
from megatron_fp8_ext.demo.schedule import Line
from megatron_fp8_ext.training_log import Iteration


def line(name, numbers, loss, rate):
    made = [
        Iteration(number=n, total=100, loss=loss(n), learning_rate=rate(n), milliseconds=1, grad_norm=1)
        for n in numbers
    ]  # fmt: skip
    return Line(name, made, 1.0)


def test_every_run_is_drawn_and_branches_begin_on_the_stable_run(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [
        line("stable", range(1, 101), lambda n: 5 - n / 50, lambda n: 1e-3),
        line("branch a", range(81, 101), lambda n: 4.9 - n / 50, lambda n: 1e-3 * (100 - n) / 20),
        line("branch b", range(91, 101), lambda n: 4.8 - n / 50, lambda n: 1e-3 * (100 - n) / 10),
    ]
    schedule.draw(tmp_path / "new" / "demo.svg", lines)
    text = (tmp_path / "new" / "demo.svg").read_text()
    ElementTree.fromstring(text)
    for shown in (
        "stable",
        "branch a",
        "branch b",
        "learning rate",
        "LM loss less the stable run's",
    ):
        assert f">{shown}<" in text
    # In three panels, each as long as its run and the point before; the legend's has three points.
    for colour, points in (("#d1495b", 21), ("#2e86ab", 11)):
        paths = re.findall(rf'<path d="([^"]*)"[^>]*stroke: {colour}', text)
        assert [len(re.findall("[ML]", path)) for path in paths if path.count("L") > 3] == [
            points
        ] * 3


def test_losses_are_means_of_the_last_ones():
    found = schedule._smooth((n, float(n)) for n in range(1, 21))
    assert (found[1], found[2], found[20]) == (1.0, 1.5, 16.5)


@pytest.mark.parametrize("iterations", ["60", "110"])
def test_lengths_without_such_branches_are_refused(iterations, tmp_path):
    done = cli("demo", "schedule", "--iterations", iterations, "--output", str(tmp_path / "out"))
    assert done.returncode == 2 and "give a multiple of 20, from 100 on" in done.stderr
    assert not (tmp_path / "out").exists()
