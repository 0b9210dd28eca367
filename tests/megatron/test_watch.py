"""`megatron-fp8 watch` on what a real Megatron run writes, while it runs and afterwards."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import struct
import subprocess
import sys
import time

import pytest
from conftest import ENTRY, MODEL, ROOT, TRAINING
from typer.testing import CliRunner

from megatron_fp8_ext import cli
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import arguments

pytestmark = pytest.mark.megatron
EVENTS = "--log-throughput --log-timers-to-tensorboard --tensorboard-log-interval 1".split()


def watch(folder, *flags: str):
    """(exit code, output) of the command, on 80 columns."""
    done = CliRunner().invoke(cli.app, ["watch", str(folder), *flags], env={"COLUMNS": "80"})
    error = f"{done.exception}\n" if isinstance(done.exception, UserError) else ""
    return 2 if error else done.exit_code, done.output + error


def figures(frame: str) -> dict[str, str]:
    """The screen's names and values."""
    names = (
        "loss", "learning rate", "gradient norm", "validation", "tokens", "recipe",
        "tokens/s", "MFU", "TFLOP/s/GPU", "s/iteration", "ETA", "GPUs",
    )  # fmt: skip
    found = {}
    for line in frame.splitlines():
        cells = re.split(r"\s{2,}", line.strip("│ "))
        for name, value in zip(cells[::2], cells[1::2], strict=False):
            if name in names:
                found[name] = value
    return found


@pytest.fixture(scope="module")
def watched(corpus, tmp_path_factory):
    """(folder, log, lines) of a run that was watched from its first iteration to its last."""
    folder = tmp_path_factory.mktemp("run")
    data = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]
    training = arguments.without(TRAINING, "--eval-iters", takes_value=True)
    argv = [
        sys.executable, str(ENTRY), *MODEL, *training, *data, *EVENTS, "--train-iters", "30",
        "--lr-warmup-iters", "0", "--eval-iters", "1", "--eval-interval", "10", "--use-distributed-optimizer",
        "--tensorboard-dir", str(folder / "tensorboard"), "--fp8-recipe", "infir2",
    ]  # fmt: skip
    with (folder / "train.log").open("w") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, cwd="/")
        command = [sys.executable, "-m", "megatron_fp8_ext.cli", "watch", str(folder)]
        live = None
        while live is None or (live.returncode == 2 and "no iteration" in live.stderr):
            assert process.poll() in (None, 0), (folder / "train.log").read_text()[-4000:]
            live = subprocess.run(
                [*command, "--interval", "0.05"], capture_output=True, text=True, cwd=ROOT
            )
            if live.returncode == 2 and "no event files" in live.stderr:
                time.sleep(0.1)
                live = None
        assert process.wait() == 0, (folder / "train.log").read_text()[-4000:]
    assert live.returncode == 0, live.stderr
    return folder, (folder / "train.log").read_text(), live.stdout.splitlines()


def test_it_follows_a_run_line_by_line_where_there_is_no_terminal(watched):
    _, _, lines = watched
    seen = [int(re.match(r"iteration (\d+)/30 \| loss \d", line).group(1)) for line in lines]
    assert seen == sorted(set(seen)) and seen[-1] == 30, lines
    assert len(seen) > 1 and lines[-1].endswith("ETA 0:00:00")


def test_the_screen_shows_what_megatron_logged(watched):
    folder, log, _ = watched
    from megatron_fp8_ext import training_log

    last = list(training_log.parse(log.splitlines()))[-1]
    code, frame = watch(folder, "--once", "--peak-tflops", "0.01")
    assert code == 0, frame
    assert max(map(len, frame.splitlines())) <= 80
    shown = figures(frame)
    assert float(shown["loss"]) == pytest.approx(last.loss, abs=1e-4)
    assert float(shown["learning rate"]) == pytest.approx(last.learning_rate, rel=1e-3)
    assert float(shown["gradient norm"]) == pytest.approx(last.grad_norm, abs=1e-3)
    rate = float(shown["tokens/s"].replace(",", ""))
    assert rate * float(shown["s/iteration"]) == pytest.approx(4 * 128, rel=0.01)
    share = float(shown["TFLOP/s/GPU"]) / 0.01
    assert float(shown["MFU"].rstrip("%")) == pytest.approx(100 * share, rel=0.01)
    assert shown["tokens"] == f"{30 * 4 * 128:,}" and shown["ETA"] == "0:00:00"
    assert shown["recipe"] == "infir2" and shown["GPUs"] == "1 x CPU"
    assert " at 30" in shown["validation"] and "finished" in frame


def test_on_a_terminal_it_is_one_screen(watched):
    folder, _, _ = watched
    child, terminal = pty.fork()
    if child == 0:
        argv = [sys.executable, "-m", "megatron_fp8_ext.cli", "watch", str(folder)]
        os.execve(sys.executable, argv, {**os.environ, "TERM": "xterm", "COLUMNS": "80"})
    drawn = b""
    with contextlib.suppress(OSError):  # the end of the child closes the terminal
        while part := os.read(terminal, 4096):
            drawn += part
    assert os.waitpid(child, 0)[1] == 0
    assert b"\x1b[?25h" in drawn and "iteration 30 of 30" in drawn.decode()


def test_without_event_files_the_log_says_the_same(watched, tmp_path):
    folder, log, _ = watched
    (tmp_path / "train.log").write_text(log)
    events, text = (figures(watch(place, "--once")[1]) for place in (folder, tmp_path))
    for name in ("loss", "learning rate", "tokens", "recipe", "GPUs", "validation"):
        assert events[name] == text[name], name
    assert "no BF16 peak known for 'CPU'" in " ".join(
        line.strip("│ ") for line in watch(tmp_path, "--once")[1].splitlines()
    )


def test_a_resumed_run_shows_its_last_start(watched, tmp_path):
    """Two event files, the second from an earlier step: the steps computed again replace the old."""
    from megatron_fp8_ext.watch.events import EventFolder
    from megatron_fp8_ext.watch.status import status

    folder, _, _ = watched
    (file,) = (folder / "tensorboard").glob("events.*")
    copy = tmp_path / file.name
    copy.write_bytes(file.read_bytes())
    first = EventFolder(tmp_path)
    assert status(first.read()).iteration == 30
    later = tmp_path / file.name.replace("tfevents.", "tfevents.9")
    whole = file.read_bytes()
    cut = [found.start() for found in re.finditer(b"learning-rate vs", whole)][14]
    later.write_bytes(whole[:cut])  # as a killed run leaves it, in the middle of an event
    half = status(first.read())
    assert half.iteration == 15 and half.eta > 0 and not half.finished
    assert set(half.losses) == set(range(1, 15))  # of the 15th only the learning rate was written
    later.write_bytes(whole)
    assert status(first.read()).iteration == 30


def test_nothing_to_watch_is_one_line(tmp_path):
    for place, words in ((tmp_path, "no event files"), (tmp_path / "none", "no such folder")):
        code, said = watch(place, "--once")
        assert code == 2 and words in said and said.count("\n") == 1
    (tmp_path / "notes.log").write_text("nothing of Megatron's\n")
    assert watch(tmp_path, "--once")[0] == 2
    file = tmp_path / "events.out.tfevents.1.host"
    for content, words in (
        (b"not an event file", "no iteration logged yet"),
        (struct.pack("<QI", 30, 0) + b"lm loss" + b"\xff" * 27, "is damaged"),
    ):
        file.write_bytes(content)
        code, said = watch(tmp_path, "--once")
        assert code == 2 and words in said and said.count("\n") == 1, said
    assert "above 0" in watch(tmp_path, "--interval", "0")[1]
