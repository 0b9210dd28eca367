"""A silent rollout server, a full disk, a dead actor: what the user reads, and what to do to go on."""

from __future__ import annotations

import errno
import signal
import threading
import time
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import checkpoints
import pytest

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.slime_plugin import failures


class Engine(BaseHTTPRequestHandler):
    """Generates until it is told to hang."""

    hung = threading.Event()
    closed = threading.Event()

    def do_GET(self):
        if self.hung.is_set():
            self.closed.wait(30)
            return
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def engine():
    Engine.hung.clear()
    Engine.closed.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    Engine.closed.set()
    server.shutdown()
    server.server_close()


def arguments(address, tmp_path, patience=0.3):
    return Namespace(
        rollout_external_engine_addrs=[address], rollout_patience=patience, save=str(tmp_path)
    )


@pytest.fixture(params=["foreground", "background"])
def started(request):
    """A shell script's `command &` has SIGINT ignored."""
    background = request.param == "background"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if background else None
    yield
    if background:
        signal.signal(signal.SIGINT, before)


def test_a_server_that_hangs_ends_the_run(engine, tmp_path, monkeypatch, started):
    monkeypatch.setattr(failures, "_INTERVAL", 0.05)
    monkeypatch.setattr(failures.Watch.__init__, "__defaults__", (failures.ailment, 0.05))
    checkpoints.write(tmp_path, 7)
    args = arguments(engine, tmp_path)
    with pytest.raises(UserError, match=r"generates nothing, no token .* goes on after rollout 7"):
        with failures.watched(args):
            time.sleep(0.5)  # answers: nothing happens
            Engine.hung.set()
            threading.Event().wait(60)


def test_a_server_that_died_is_named(tmp_path):
    args = arguments("127.0.0.1:9", tmp_path, patience=60)
    with pytest.raises(
        UserError,
        match=r"http://127\.0\.0\.1:9 does not answer \(Connection refused\).*no checkpoint",
    ):
        with failures.watched(args):
            raise ConnectionError("All connection attempts failed")


def test_other_errors_pass_while_the_server_answers(engine, tmp_path):
    with pytest.raises(ZeroDivisionError), failures.watched(arguments(engine, tmp_path)):
        raise ZeroDivisionError


def test_a_full_disk_and_a_dead_actor_are_explained(tmp_path, monkeypatch):
    args = Namespace(save=str(tmp_path))
    full = RuntimeError("save failed")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert "no space left for" in str(failures.explain(full, args))
    # What reaches the driver of a full disk: torch's writer lost the reason.
    load = RuntimeError("ray::Actor.init() CheckpointException ranks:dict_keys([0])")
    lost = RuntimeError("ray::Actor.save_model() CheckpointException ranks:dict_keys([0])")
    assert "could not be written" in str(failures.explain(lost, args))
    checkpoints.write(tmp_path, 3)
    monkeypatch.setattr(failures.shutil, "disk_usage", lambda _: Namespace(free=100))
    assert "no space left for" in (said := str(failures.explain(lost, args)))
    assert said.endswith("goes on after rollout 3")
    own = UserError("scales differ")
    assert str(failures.explain(own, args)) == "scales differ"
    ray = pytest.importorskip("ray")
    assert failures.explain(ZeroDivisionError(), args) is None
    assert failures.explain(load, args) is None
    died = str(failures.explain(ray.exceptions.ActorDiedError(), args))
    assert "an actor died" in died and "start the same command again" in died


def test_an_actor_whose_constructor_raises_says_what_it_raised(tmp_path):
    ray = pytest.importorskip("ray")
    raised = ray.exceptions.RayTaskError("init", "Traceback ...\nRuntimeError: no device", None)
    said = str(failures.explain(ray.exceptions.ActorDiedError(raised), Namespace(save=None)))
    assert said.startswith("an actor could not start: RuntimeError: no device; mend it, then")
