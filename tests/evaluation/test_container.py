"""LiveCodeBench through real evalscope, its programs in real containers.

Needs MEGATRON_FP8_EVALSCOPE and a Docker daemon with the image python:3.11-slim. The model is scripted:
what is tested is what happens to the programs that it writes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.evaluation import benchmarks, container, datasets, evalscope, results, sandbox

pytestmark = pytest.mark.slow
SERVER = Path(__file__).with_name("scripted_server.py")
TESTS = [{"input": "1 2\n", "output": "3\n"}, {"input": "20 22\n", "output": "42\n"}]
CALLS = [{"input": "[1, 2, 1]", "output": "2"}]
STARTER = "class Solution:\n    def most(self, values: List[int]) -> int:\n        "
# Each answers both questions in turn, so each question gets all of them.
PROGRAMS = {
    "right": (
        "a, b = map(int, input().split())\nprint(a + b)",
        # Counter without an import: LiveCodeBench's grader imports it for every program.
        STARTER + "return Counter(values).most_common(1)[0][1]",
    ),
    "wrong": ("print(41)", STARTER + "return 7"),
    "escapes": (
        "import socket\n"
        "open('{outside}', 'w').write('x')\n"
        "socket.create_connection(('127.0.0.1', {port}), 2)\n"
        "a, b = map(int, input().split())\nprint(a + b)",
        "import socket\n"
        + STARTER
        + "socket.create_connection(('127.0.0.1', {port}), 2); return 2",
    ),
    "lingers": (
        "import os, time\n"
        "for _ in range(200):\n    if os.fork() == 0:\n        os.setsid(); time.sleep(600)\n",
        "import os\nopen('/tmp/json.py', 'w').write('1/0')\n" + STARTER + "os.kill(-1, 9)",
    ),
    "endless": ("while True: print('x' * 1000)", STARTER + "while True: pass"),
    "right again": (
        "a, b = map(int, input().split())\nprint(a + b)",
        "import json\n" + STARTER + "return max(values)",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def needs() -> None:
    try:
        evalscope.python_of()
    except UserError as error:
        pytest.skip(str(error))
    if problem := sandbox.problem():
        pytest.skip(problem)


@pytest.fixture
def command(tmp_path):
    rows = [
        {"question_content": "Add.", "starter_code": "", "public_test_cases": json.dumps(TESTS),
         "metadata": "{}"},
        {"question_content": "How often is the most frequent?", "starter_code": STARTER,
         "public_test_cases": json.dumps(CALLS), "metadata": json.dumps({"func_name": "most"})},
    ]  # fmt: skip
    for row in rows:
        row |= {"private_test_cases": "[]", "contest_date": "2024-09-01T00:00:00"}
    (tmp_path / "livecodebench.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"0")
    outside = str(tmp_path / "outside")
    answers = [[p.replace("{outside}", outside) for p in pair] for pair in PROGRAMS.values()]
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    server = f"{sys.executable} {SERVER} {{port}} {tmp_path / 'answers.json'}"
    return [
        sys.executable, "-m", "megatron_fp8_ext.cli", "eval", "livecodebench",
        "--model", str(tmp_path / "model"), "--server-command", server, "--data", str(tmp_path),
        "--output", str(tmp_path / "out"), "--samples", str(len(PROGRAMS)), "--batch", "1",
    ]  # fmt: skip


ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def containers(work: Path) -> list[str]:
    words = ["docker", "ps", "-aq", "--filter", f"label={container.LABEL}={sandbox.label(work)}"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.timeout(900)
def test_programs_are_scored_and_contained(command, tmp_path):
    work = tmp_path / "out" / "livecodebench"
    log = (tmp_path / "log").open("w")
    runner = subprocess.Popen(command, env=ENV, stderr=log, stdout=log)
    deadline = time.monotonic() + 300
    while not (results.finished(work) and containers(work)):
        assert runner.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    while containers(work):
        assert time.monotonic() < deadline, "kill -9 leaves no container"
        time.sleep(0.2)
    # The scripted model starts over with the server; what it has answered is kept.
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not containers(work) and not (tmp_path / "outside").exists()
    # Its programs were asked for once or twice: score each by what it is.
    reviews = (work / "reviews").glob("*/*.jsonl")
    scored = [json.loads(line)["sample_score"]["score"] for f in reviews for line in f.open()]
    assert len(scored) == 2 * len(PROGRAMS)
    for score in scored:
        program = score["extracted_prediction"]
        right = program in (*PROGRAMS["right"], *PROGRAMS["right again"])
        assert score["value"]["acc"] == right, score
        assert score["metadata"]["execution_method"] == "sandbox"
    assert any(s["value"]["acc"] for s in scored)


def prepared(tmp_path):
    benchmark = benchmarks.get("livecodebench")
    python = evalscope.python_of()
    data = datasets.prepare(benchmark, [tmp_path / "livecodebench.jsonl"], tmp_path / "d", python)
    task = evalscope.task(
        benchmark, evalscope.settings(benchmark), served_name="m", data=data.folder, work=tmp_path
    )
    return python, task


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda task: task.pop("sandbox"), "in a local Docker container only"),
        (lambda task: task["sandbox"].update(enabled=False), "in a local Docker container only"),
        (lambda task: task["sandbox"]["default_config"].update(image="none:0"), "none:0"),
        (
            lambda task: task["sandbox"]["default_config"].update(pids=1),
            "does not know sandbox.default_config.pids",
        ),
    ],
)
def test_evalscope_runs_no_program_without_our_container(command, tmp_path, change, words):
    python, task = prepared(tmp_path)
    change(task)
    with pytest.raises(UserError, match=words):
        evalscope.check(python, task, tmp_path, offline=True)


@pytest.mark.timeout(900)
def test_a_container_that_dies_is_no_wrong_answer(command, tmp_path):
    command[command.index("--samples") + 1] = "3"
    work = tmp_path / "out" / "livecodebench"
    answers = tmp_path / "answers.json"
    slow = ["import time; time.sleep(1)\n" + program for program in PROGRAMS["right"]]
    slow[1] = slow[1].replace(STARTER, STARTER + "time.sleep(1); ")
    answers.write_text(json.dumps([slow] * 50))
    log = (tmp_path / "log").open("w")
    runner = subprocess.Popen(command, env=ENV, stderr=log, stdout=log)
    deadline = time.monotonic() + 300
    while not (results.finished(work) and (found := containers(work))):
        assert runner.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)
    subprocess.run(["docker", "rm", "-fv", *found], check=True, capture_output=True)
    assert runner.wait(300) == 0, (tmp_path / "log").read_text()
    told = " ".join((tmp_path / "log").read_text().split())
    assert "exit code 70 (the container sandbox-" in told in told
    outcome = json.loads((tmp_path / "out" / "results.json").read_text())
    assert outcome["benchmarks"]["livecodebench"]["average"] == 100
