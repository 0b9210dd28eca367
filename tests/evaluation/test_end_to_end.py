"""Real evalscope, a real server (`transformers serve` on the CPU), SmolLM2 in BF16 and as a Qwen2 in FP8.

Needs MEGATRON_FP8_EVALSCOPE (an environment with evalscope, `megatron-fp8 eval setup`) and
MEGATRON_FP8_SERVER_PYTHON (a Python with torch, transformers[serving], accelerate, gguf).
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
from conftest import ROOT

from megatron_fp8_ext.demo import text
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.evaluation import evalscope, results

pytestmark = pytest.mark.slow
QUESTIONS = [("What is 2 + 3?", 5), ("What is 7 + 1?", 8)]


@pytest.fixture(scope="session")
def server_python() -> str:
    try:
        evalscope.python_of()
    except UserError as error:
        pytest.skip(str(error))
    python = os.environ.get("MEGATRON_FP8_SERVER_PYTHON")
    if not python:
        pytest.skip(
            "needs MEGATRON_FP8_SERVER_PYTHON, a Python with torch and transformers[serving]"
        )
    return python


@pytest.fixture(scope="session")
def models(server_python, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    maker = Path(__file__).with_name("make_models.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    words = [server_python, str(maker), str(text.tokenizer_file()), str(folder)]
    subprocess.run(words, check=True, env=env)
    return folder


@pytest.fixture
def command(models, server_python, tmp_path):
    rows = [json.dumps({"problem": p, "answer": a}) for p, a in QUESTIONS]
    (tmp_path / "aime24.jsonl").write_text("\n".join(rows) + "\n")

    def words(name: str, output: Path) -> list[str]:
        return [
            sys.executable, "-m", "megatron_fp8_ext.cli", "eval", "aime24",
            "--model", str(models / name), "--server", "transformers",
            "--server-python", server_python, "--server-args", "--device cpu",
            "--data", str(tmp_path), "--output", str(output), "--samples", "3",
            "--max-tokens", "24", "--batch", "1", "--pass-at", "1,3",
        ]  # fmt: skip

    return words


ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def processes(mark: str) -> dict[int, str]:
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if mark in line and int(entry.name) != os.getpid():
            found[int(entry.name)] = line
    return found


def until(condition, seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def server_of(model: Path) -> tuple[int, int]:
    """Process id and port of the server itself, below its guard."""
    for pid, line in processes(f"serve {model}").items():
        if "guard.py" not in line:
            return pid, int(line.split("--port ")[1].split()[0])
    return 0, 0


@pytest.mark.timeout(1800)
def test_scores_survive_kill_9_of_server_and_runner(command, models, tmp_path):
    for name in ("bf16", "fp8"):
        output = tmp_path / name
        work = output / "aime24"
        if name == "fp8":
            log = (tmp_path / "log").open("w")
            runner = subprocess.Popen(command(name, output), env=ENV, stderr=log, stdout=log)
            until(lambda work=work: results.finished(work) >= 1)
            os.kill(server_of(models / name)[0], signal.SIGKILL)
            until(lambda work=work: results.finished(work) >= 3)
            _, port = server_of(models / name)
            runner.kill()
            runner.wait()
            until(lambda name=name: not processes(str(models / name)), 60)
            assert "the server stopped" in (tmp_path / "log").read_text()
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0
            kept = (work / "predictions" / "model" / "aime24_default.jsonl").read_text()
        done = subprocess.run(command(name, output), env=ENV, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert not processes(str(models / name)) and not processes("evaluation/runner.py")
        found = json.loads((output / "results.json").read_text())["benchmarks"]["aime24"]
        assert found["questions"] == 2 and found["samples"] == 3
        assert 0 < found["average"] <= 100, "SmolLM2 adds small numbers"
        if name == "fp8":
            after = (work / "predictions" / "model" / "aime24_default.jsonl").read_text()
            assert after.startswith(kept), "resumed, not begun anew"
    # The server applied the chat template once: as many tokens as one rendering has.
    rendered = (
        "import sys, json; from transformers import AutoTokenizer as A\n"
        "t = A.from_pretrained(sys.argv[1]); m = json.load(open(sys.argv[2]))['prompts']\n"
        "r = [t.apply_chat_template(x, add_generation_prompt=True, tokenize=False) for x in m]\n"
        "assert all(x.count('<|im_start|>') == 3 for x in r), r\n"
        "print(json.dumps([len(t(x, add_special_tokens=False)['input_ids']) for x in r]))"
    )
    work = tmp_path / "bf16" / "aime24"
    words = [str(evalscope.python_of()), "-c", rendered, str(models / "bf16")]
    done = subprocess.run([*words, str(work / "check.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lengths = json.loads(done.stdout)
    assert all(a.prompt_tokens == lengths[a.question] for a in results.read(work))
    compared = subprocess.run(
        [*command("bf16", tmp_path)[:4], "compare", str(tmp_path / "bf16"), str(tmp_path / "fp8")],
        env={**ENV, "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert compared.returncode == 0 and "95 % interval" in compared.stdout, compared.stderr
    other = subprocess.run(
        [*command("bf16", tmp_path / "fp8")], env=ENV, capture_output=True, text=True
    )
    assert other.returncode == 2 and "another model" in other.stderr
