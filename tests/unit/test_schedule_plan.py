"""`megatron-fp8 schedule plan`: the table, the picture, and what it refuses."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import checkpoints
import pytest
from conftest import EXAMPLE_PACKAGE, ROOT
from test_cli import cli

from megatron_fp8_ext import schedule_plan
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.schedule import WSD, Batch
from megatron_fp8_ext.schedule_plan import Curve, Row, Scale

INFIR2 = (
    "--lr-schedule wsd --train-iters 40000 --wsd-warmup-iters 5000 --wsd-decay-iters 5000 --lr 1e-4 "
    "--min-lr 1e-5 --global-batch-size 512 --seq-length 4096"
).split()


def rows(text):
    """The table's rows as lists of words."""
    return [line.split() for line in text.splitlines() if " to " in line and "phase" not in line]


def test_phases_of_infir2_in_every_unit():
    done = cli("schedule", "plan", *INFIR2, "--bf16", "--data-path", "x")
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout) == [
        "run warmup 0 5000 5000 2.56M 10.49B 0 to 0.0001".split(),
        "stable 5000 35000 30000 15.36M 62.91B 0.0001 to 0.0001".split(),
        "cosine decay 35000 40000 5000 2.56M 10.49B 0.0001 to 1e-05".split(),
    ]
    assert "40000 iterations" in done.stdout and done.stdout.count("*") > 60


def test_branches_on_one_picture(tmp_path):
    pytest.importorskip("matplotlib")
    svg = tmp_path / "new" / "plan.svg"
    done = cli(
        "schedule", "plan", *INFIR2, "--branch", "20000:10%", "--branch", "30000:4000:linear",
        "--svg", str(svg),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout)[3:] == [
        "branch 20000:10% cosine decay 20000 22222 2222 1.138M 4.66B 0.0001 to 1e-05".split(),
        "branch 30000:4000:linear linear decay 30000 34000 4000 2.048M 8.389B 0.0001 to 1e-05".split(),
    ]
    drawn = svg.read_text()
    ElementTree.fromstring(drawn)
    for name in ("run", "branch 20000:10%", "branch 30000:4000:linear", "learning rate"):
        assert f">{name}<" in drawn
    assert [path.name for path in svg.parent.iterdir()] == ["plan.svg"]


def test_a_strangers_schedule_is_planned_on_equal_terms():
    path = {"PYTHONPATH": f"{ROOT}:{EXAMPLE_PACKAGE}"}
    done = cli(
        "schedule", "plan", "--lr-schedule", "acme-sqrt", "--train-iters", "50", "--lr", "1", **path
    )
    assert rows(done.stdout)[1] == "minus_sqrt decay 40 50 10 - - 1 to 0".split()
    assert "acme-sqrt" in cli("list", "schedules", **path).stdout


def test_a_branch_from_a_checkpoint_shows_its_jump(tmp_path):
    checkpoints.write(tmp_path, 40)
    argv = ["--wsd-decay-from", str(tmp_path), "--wsd-decay-iters", "10"]
    done = cli("schedule", "plan", *argv, "--lr", "5e-4")
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout) == [
        "stable run warmup 0 2 2 8 128 0 to 0.001".split(),
        "stable 2 40 38 152 2432 0.001 to 0.001".split(),
        "branch at 40 JUMP 40 40 0 0 0 0.001 to 0.0005".split(),
        "linear decay 40 50 10 40 640 0.0005 to 1e-05".split(),
    ]
    assert "JUMP" not in cli("schedule", "plan", *argv).stdout
    assert "sized as the stable run's, for 400 samples" in done.stdout


def test_without_a_batch_size_it_counts_in_iterations():
    done = cli("schedule", "plan", "--lr-schedule", "wsd", "--train-iters", "9", "--lr", "1")
    assert rows(done.stdout) == ["stable run stable 0 9 9 - - 1 to 1".split()]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr-schedule", "wsd", "--train-iters", "9"], "--lr is missing"),
        ([*INFIR2, "--branch", "10:x"], "neither a number nor a percentage"),
        ([*INFIR2, "--branch", "10"], "write ITERATION:LENGTH"),
        ([*INFIR2, "--branch", "20000:100%"], "below 100%"),
        ([*INFIR2, "--branch", "20000:0.5"], "no whole number of iterations"),
        ([*INFIR2, "--branch", "20000:9:square"], "unknown --branch STYLE 'square'"),
        (
            [*INFIR2, "--branch", "4000:9"],
            "at iteration 4000 is inside the warmup: branch at 5000 or",
        ),
        ([*INFIR2, "--branch", "36000:9"], "is inside the decay: branch at 35000 or earlier"),
        ([*INFIR2, "--branch", "50000:9"], "is after the end of the run"),
        ([*INFIR2, "--min-lr", "1"], "--min-lr 1 is above --lr"),
        ([*INFIR2, "--lr", "0"], "--lr is a positive number"),
        (
            [*INFIR2, "--wsd-decay-itres", "9"],
            "'--wsd-decay-itres': did you mean '--wsd-decay-iters'",
        ),
        ([*INFIR2, "--lr-decay-style", "cosine"], "contradicts --lr-schedule wsd"),
        (INFIR2[2:], "--wsd-warmup-iters needs --lr-schedule wsd: add it"),
        (
            ["--lr", "1", "--train-iters", "9"],
            "--lr-decay-style linear (as none is given) has no stable",
        ),
        ([*INFIR2, "--svg", "/dev/null/x.svg"], "/dev/null/x.svg cannot be written: "),
        (["--wsd-decay-from", "/nowhere", "--wsd-decay-iters", "9"], "there is no such folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused_is_one_line(argv, words):
    done = cli("schedule", "plan", *argv)
    assert done.returncode == 2 and words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_native_flags_it_becomes_are_planned_alike():
    own = [
        "--lr-schedule",
        "wsd",
        "--train-iters",
        "50",
        "--wsd-decay-fraction",
        "0.2",
        "--lr",
        "1",
    ]
    native = cli("expand", "--", *own).stdout.splitlines()[-1].split()
    assert "--lr-wsd-decay-iters" in native
    assert cli("schedule", "plan", *native).stdout == cli("schedule", "plan", *own).stdout
    constant = [*native, "--lr-decay-style", "constant"]
    assert rows(cli("schedule", "plan", *constant).stdout) == [
        "stable run stable 0 50 50 - - 1 to 1".split()
    ]


def test_what_a_branch_contradicts_is_refused_in_the_plan_too(tmp_path):
    checkpoints.write(tmp_path, 40)
    argv = ["--wsd-decay-from", str(tmp_path), "--wsd-decay-iters", "10", "--train-iters", "44"]
    done = cli("schedule", "plan", *argv)
    assert done.returncode == 2 and "--train-iters 44 contradicts --wsd-decay-from" in done.stderr


WHOLE = WSD(lr=1.0, min_lr=0.1, warmup_samples=10, total_samples=100, decay_samples=20)


def test_rows_end_where_the_curve_ends():
    assert schedule_plan.rows(Curve("run", WHOLE, 0, 50)) == [
        Row("warmup", 0, 10, 0.0, 1.0), Row("stable", 10, 50, 1.0, 1.0),
    ]  # fmt: skip


def test_a_branch_begins_at_the_stable_rate_and_ends_at_its_own():
    made = schedule_plan.branch(WHOLE, 20, 15, "linear", size=2)
    assert (made.at(40), made.at(55), made.at(70)) == (1.0, pytest.approx(0.55), WHOLE.min_lr)
    for at, words in (
        (41, "inside the decay: branch at 40 or earlier"),
        (4, "inside the warmup: branch at 5 or later"),
        (0, "no checkpoint: branch at 5 or later"),
    ):
        with pytest.raises(UserError, match=words):
            schedule_plan.branch(WHOLE, at, 5, size=2)


def test_the_terminal_picture_has_its_size_and_marks():
    other = Curve("branch", schedule_plan.branch(WHOLE, 40, 30), 40, 70)
    lines = schedule_plan.draw([Curve("run", WHOLE, 0, 100), other], Scale("iters", Batch()), 60, 9)
    assert len(lines) == 11 and all(len(line) <= 72 for line in lines)
    assert re.match(r" ?1\.00e\+00 \|", lines[0])
    body = "".join(lines[:9])
    assert "*" in body and "1" in body[12:]
    assert [line[:11].strip() for line in lines[:9:3]] == ["1.00e+00 |", "6.25e-01 |", "2.50e-01 |"]
    decay = [line[11 + 42 :] for line in lines[:9]]  # beyond the branch: the run's own decay
    assert all("*" in line for line in decay[:8])
