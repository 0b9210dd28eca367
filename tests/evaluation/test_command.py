"""The eval command at a terminal: errors in one line each, warnings with their mend, Ctrl-C.

Real evalscope (MEGATRON_FP8_EVALSCOPE) and a scripted model.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, free_port

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.evaluation import evalscope, results

pytestmark = pytest.mark.slow
SERVER = Path(__file__).with_name("scripted_server.py")
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


@pytest.fixture(scope="module", autouse=True)
def needs() -> None:
    try:
        evalscope.python_of()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def command(tmp_path):
    rows = [{"problem": f"What is 2 + {n}?", "answer": 2 + n} for n in (1, 2)]
    (tmp_path / "aime24.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "generation_config.json").write_text('{"top_k": 20, "temperature": 1.0}')
    (tmp_path / "model" / "model.safetensors").write_bytes(b"0")
    (tmp_path / "answers.json").write_text(json.dumps([["\\boxed{3}"]]))

    def words(mode: str, *more: str) -> list[str]:
        server = f"{sys.executable} {SERVER} {{port}} {tmp_path / 'answers.json'} {mode}"
        return [
            sys.executable, "-m", "megatron_fp8_ext.cli", "eval", "aime24",
            "--model", str(tmp_path / "model"), "--server-command", server,
            "--data", str(tmp_path), "--output", str(tmp_path / "out"), "--samples", "4",
            "--batch", "1", *more,
        ]  # fmt: skip

    return words


def test_a_table_and_what_to_mend(command, tmp_path):
    done = subprocess.run(
        command("cut", "--pass-at", "1,4"), env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]["aime24"]
    assert found["average"] == 50 and found["right"] == [4, 0] and found["truncated"] == 100
    assert set(found["pass_at"]) == {"1", "4"} and found["published"] == {
        "1.5B": 17.39,
        "7B": 55.73,
    }
    for text in ("50.00", "17.39 / 55.73", "100.0 %"):
        assert text in done.stdout
    said = " ".join(done.stderr.split())
    assert "all answers were cut at 31000 tokens" in said
    assert "generation_config.json says top_k 20" in said
    assert "evalscope 1.14 compares integers only" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize(
    ("mode", "more", "words"),
    [
        (
            "broken",
            (),
            "before it was ready; the end of {out}/server.log: ValueError: size mismatch",
        ),
        ("loading", ("--server-timeout", "2"), "was not ready after 2 s (503"),
        ("good", ("--port", "{taken}"), "--port {taken} is taken"),
        ("good", ("--data", "{out}"), None),
        ("good", ("--pass-at", "8"), "raise --samples to 8"),
    ],
)
def test_errors_are_one_line(command, tmp_path, mode, more, words):
    out = tmp_path / "out"
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        fill = {"out": out, "taken": busy.getsockname()[1]}
        argv = command(mode, *(word.format(**fill) for word in more))
        if words is None:
            (tmp_path / "aime24.jsonl").unlink()
            words = "no data for aime24"
        done = subprocess.run(argv, env=ENV, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if "error:" in x]
    assert words.format(**fill) in line, line
    assert not (out / "results.json").exists()


def test_ctrl_c_stops_everything_and_the_same_command_resumes(command, tmp_path):
    port = free_port()
    argv = command("slow", "--port", str(port))
    runner = subprocess.Popen(argv, env=ENV, stderr=subprocess.PIPE, text=True)
    work = tmp_path / "out" / "aime24"
    deadline = time.monotonic() + 300
    while not results.finished(work):
        assert runner.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    runner.send_signal(signal.SIGINT)
    _, said = runner.communicate(timeout=120)
    assert runner.returncode == 130 and "the same command resumes" in said
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in left, "no orphan"
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    (file,) = (work / "predictions").glob("*/*.jsonl")
    kept = file.read_text()
    done = subprocess.run(argv, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert file.read_text().startswith(kept) and results.finished(work) == 8
