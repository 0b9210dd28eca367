"""What happens to a run from outside: its train actor killed inside a step, a disk that fills; and what is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

KILLED_AT = 1  # the rollout whose step is cut off: the first with a checkpoint behind it
MARK = "killed"


def kill_in_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler) -> None:
    """Kill this actor between the backward pass and the optimizer, once.

    Value of `--custom-megatron-before-train-step-hook-path`; a second run into the same folder lives.
    """
    mark = Path(os.environ["RL_LOOP_OUT"]) / MARK
    if rollout_id != KILLED_AT or mark.exists():
        return

    def step() -> Any:
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    optimizer.step = step


def left_running(out: Path, patience: float = 30.0) -> list[str]:
    """Return the processes of the run in `out` that live `patience` seconds after its launcher ended."""
    end = time.monotonic() + patience
    while (found := _processes(out)) and time.monotonic() < end:
        time.sleep(0.5)
    return found


def _processes(out: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            dead = process.status() == psutil.STATUS_ZOMBIE
            if not dead and process.environ().get("RL_LOOP_OUT") == str(out):
                found.append(" ".join(process.cmdline())[:200])
    return found


class Disk:
    """A tmpfs of a few megabytes in a mount namespace of its own: no privilege is needed.

    Attributes:
        enter: words before a command that shall see it.
    """

    def __init__(self, holder: int, folder: Path) -> None:
        self.folder = folder
        self.enter = ["nsenter", "--preserve-credentials", "--user", "--mount", "--target"]
        self.enter.append(str(holder))
        self.seen = Path(f"/proc/{holder}/root{folder}")  # the same folder, seen from here

    def grow(self, size: int) -> None:
        """Make it `size` bytes; what lies on it stays."""
        command = [*self.enter, "mount", "-o", f"remount,size={size}", str(self.folder)]
        subprocess.run(command, check=True)


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[Disk | None]:
    """Mount `size` bytes on `folder`; None where the kernel lends no namespace."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = f'mount -t tmpfs -o size={size} tmpfs "$0" && echo mounted && exec sleep infinity'
    holder = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(folder)],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        yield Disk(holder.pid, folder) if holder.stdout.readline() == b"mounted\n" else None
    finally:
        holder.kill()
        holder.wait()
