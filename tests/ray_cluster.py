"""A real Ray cluster of several nodes on one machine, for tests: `ray start`, one process group a node."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import ROOT, free_port

PYTHON = "MEGATRON_FP8_SLIME_PYTHON"


@functools.cache
def python() -> str:
    """Python of an environment with slime's packages and `ray[default]`; skips the test without one."""
    found = os.environ.get(PYTHON)
    if not found:
        pytest.skip(
            f"needs {PYTHON}, a Python with ray[default] and what slime imports (docs/rl.md)"
        )
    code = (
        "from importlib.util import find_spec as f; "
        "raise SystemExit(not (f('ray') and f('sglang') and f('aiohttp_cors')))"
    )
    if subprocess.run([found, "-c", code], capture_output=True).returncode:
        pytest.skip(f"{PYTHON}={found} lacks ray[default] or sglang")
    return found


def environment(**more: str) -> dict[str, str]:
    """Variables of a node, and of who submits to it: this Python's programs first on PATH."""
    drop = ("MEGATRON_FP8_EXT", "NVTE_", "RAY_", "SLIME_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    path = os.pathsep.join((str(Path(python()).parent), clean["PATH"]))
    return {
        **clean, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0",
        "WANDB_MODE": "disabled", **more,
    }  # fmt: skip


@contextlib.contextmanager
def started(folder: Path, nodes: Sequence[dict[str, str]], gpus: int = 1) -> Iterator[str]:
    """Run a node for each of `nodes`, in `folder`; yields the dashboard's URL.

    Args:
        folder: where the nodes are started, and so the meaning of a relative path in a job.
        nodes: variables of each node.
        gpus: GPUs that Ray is told of, a node.
    """
    port, dashboard = free_port(), free_port()
    temporary = tempfile.mkdtemp(prefix="ray-")  # sockets' paths must be short
    head = f"--head --port {port} --dashboard-host 127.0.0.1 --dashboard-port {dashboard}"
    running = []
    try:
        for number, variables in enumerate(nodes):
            words = (
                [*head.split(), "--temp-dir", temporary]
                if number == 0
                else ["--address", f"127.0.0.1:{port}"]
            )
            words += (
                f"--node-ip-address 127.0.0.{number + 1} --num-gpus {gpus} --num-cpus 6".split()
            )
            words += (
                f"--dashboard-agent-listen-port {free_port()} --block --disable-usage-stats".split()
            )
            with (Path(temporary) / f"node{number}.log").open("wb") as log:
                process = subprocess.Popen(
                    ["ray", "start", *words], cwd=folder, env=environment(**variables), stdout=log,
                    stderr=log, start_new_session=True,
                )  # fmt: skip
            running.append(process)
            _wait(f"http://127.0.0.1:{dashboard}", number + 1, process)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        for process in reversed(running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def _wait(dashboard: str, nodes: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until the cluster has `nodes` nodes and takes jobs."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{dashboard}/api/jobs/", timeout=5).close()
            with urllib.request.urlopen(f"{dashboard}/nodes?view=summary", timeout=5) as answer:
                if answer.read().count(b'"ALIVE"') >= nodes:
                    return
        time.sleep(0.5)
    raise RuntimeError(f"node {nodes} of the Ray cluster did not start")
