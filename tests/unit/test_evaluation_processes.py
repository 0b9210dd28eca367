"""Servers and their children end with us; a server that fails says why. Real processes throughout."""

from __future__ import annotations

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
from megatron_fp8_ext.evaluation import server as serving
from megatron_fp8_ext.evaluation.process import Guarded
from megatron_fp8_ext.evaluation.server import Server, ServerSpec

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")

# Serves one-token answers, and has a worker in a session of its own, as inference servers do.
SERVER = """
import http.server, json, os, subprocess, sys, time
port, mode = int(sys.argv[1]), sys.argv[2]
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", os.environ["MARK"]],
                 start_new_session=True)
if mode == "broken":
    print("loading weights"); print("ValueError: shapes do not match", flush=True); sys.exit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        wrong = self.headers["Authorization"] != "Bearer " + os.environ["MEGATRON_FP8_EVAL_KEY"]
        code = 401 if wrong else {"loading": 503, "failing": 500}.get(mode, 200)
        body = json.dumps({"choices": [{"message": {"content": "yes"}}]}).encode()
        self.send_response(code); self.send_header("Content-Length", str(len(body)))
        self.end_headers(); self.wfile.write(body)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def marked(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def gone(mark: str) -> bool:
    deadline = time.monotonic() + 30
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not marked(mark)


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def spec(tmp_path, monkeypatch):
    mark = f"mark-{os.getpid()}-{tmp_path.name}"
    monkeypatch.setenv("MARK", mark)
    file = tmp_path / f"{mark}.py"
    file.write_text(SERVER)

    def make(mode="good", **more):
        command = f"{sys.executable} {file} {{port}} {mode}"
        return mark, ServerSpec(
            **{"kind": "sglang", "name": "m", "model": tmp_path, "command": command, **more}
        )

    return make


def test_started_answered_restarted_stopped(spec, tmp_path):
    mark, how = spec()
    server = Server(how, tmp_path)
    server.start()
    assert server.url.startswith("http://127.0.0.1:") and len(marked(mark)) >= 2
    with pytest.raises(UserError, match="401"):
        serving.generate(server.url, "wrong", "m", 10)
    os.kill(server.process.pid, signal.SIGKILL)
    while server.alive():
        time.sleep(0.05)
    assert gone(mark), "a crash leaves no worker behind"
    server.stop()
    server.start()
    port = int(server.url.split(":")[2].split("/")[0])
    assert server.starts == 2 and listening(port)
    server.stop()
    assert gone(mark) and not listening(port)


def test_kill_9_of_the_runner_ends_everything(spec, tmp_path):
    mark, how = spec()
    port = free_port()
    code = (
        "import time, pathlib\n"
        "from megatron_fp8_ext.evaluation.server import Server, ServerSpec\n"
        f"place = pathlib.Path({str(tmp_path)!r})\n"
        f"spec = ServerSpec(kind='sglang', name='m', model=place, port={port},"
        f" command={how.command!r})\n"
        "s = Server(spec, place); s.start(); print('up', flush=True); time.sleep(600)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    runner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env)
    assert runner.stdout.readline() == b"up\n" and listening(port)
    runner.kill()
    runner.wait()
    assert gone(mark) and not listening(port)


def test_kill_9_of_the_guard_ends_the_command(tmp_path):
    process = Guarded([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log")
    process._guard.kill()
    process._guard.wait()
    assert process.poll() == -9
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process.pid}/cmdline").exists() and time.monotonic() < deadline:
        if not Path(f"/proc/{process.pid}/cmdline").read_bytes():
            break  # a zombie that nobody here can reap
        time.sleep(0.05)
    assert (
        not Path(f"/proc/{process.pid}").exists()
        or not Path(f"/proc/{process.pid}/cmdline").read_bytes()
    )
    process.stop()


def test_kill_9_of_the_runner_runs_what_must_come_after(tmp_path):
    """As `docker rm` must: containers are no children of ours."""
    code = (
        "import pathlib, sys, time\n"
        "from megatron_fp8_ext.evaluation.process import Guarded\n"
        f"place = pathlib.Path({str(tmp_path)!r})\n"
        "Guarded([sys.executable, '-c', 'import time; time.sleep(600)'], place / 'log',\n"
        "        after=['touch', str(place / 'removed')])\n"
        "print('up', flush=True); time.sleep(600)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    runner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env)
    assert runner.stdout.readline() == b"up\n" and not (tmp_path / "removed").exists()
    runner.kill()
    runner.wait()
    deadline = time.monotonic() + 30
    while not (tmp_path / "removed").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("mode", "more", "words"),
    [
        ("broken", {}, "stopped with exit code 3 before it was ready.*shapes do not match"),
        ("failing", {}, "fails to generate .500"),
        ("loading", {"ready_s": 3.0}, "was not ready after 3 s .503.*--server-timeout"),
    ],
)
def test_a_server_that_fails_says_why(spec, tmp_path, mode, more, words):
    mark, how = spec(mode, **more)
    with pytest.raises(UserError, match=words) as caught:
        Server(how, tmp_path).start()
    assert "\n" not in str(caught.value) and gone(mark)


def test_a_missing_program_and_a_taken_port(spec, tmp_path):
    _, how = spec(command="no-such-server {port}")
    with pytest.raises(UserError, match="no-such-server: No such file"):
        Server(how, tmp_path).start()
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} is taken"):
            Server(spec(port=port)[1], tmp_path).start()


@pytest.mark.parametrize("kind", ["sglang", "vllm", "transformers"])
def test_keys_stay_off_the_command_line(tmp_path, kind):
    how = ServerSpec(kind=kind, name="m", model=tmp_path, python="python")
    words, env = serving.command(how, 1234, "SECRET", tmp_path / "key")
    assert "SECRET" not in " ".join(words) and "127.0.0.1" in words and "1234" in words
    if kind == "sglang":
        assert (tmp_path / "key").stat().st_mode & 0o077 == 0
        assert "SECRET" in (tmp_path / "key").read_text()
    if kind == "vllm":
        assert env["VLLM_API_KEY"] == "SECRET"
