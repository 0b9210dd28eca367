"""Run a command that cannot outlive us: `python -I guard.py FD AFTER COMMAND...` (no imports of ours).

FD is one end of a socket pair whose other end only the parent holds. However the parent dies, kill -9
included, the socket reaches its end, and the guard stops the command and everything it started:
SIGTERM to all of it, SIGKILL to what is left after `GRACE_S`. On Linux the guard adopts
orphaned descendants, so that a server's workers in sessions of their own are found too; and the
command is killed if the guard itself is. AFTER, a JSON list of words, is run last: it ends what is
not ours to kill, such as containers, which a daemon of their own holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

GRACE_S = 10.0
AFTER_S = 120.0
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def descendants(root: int) -> list[int]:
    """Return the living processes below `root`; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(entry.parent.name))
    found: list[int] = []
    below = list(children.get(root, ()))
    while below:
        process = below.pop()
        found.append(process)
        below += children.get(process, ())
    return found


def _reap() -> dict[int, int]:
    """Return the exit statuses of all children that have ended."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                break
            ended[process] = os.waitstatus_to_exitcode(status)
    return ended


def _signal(group: int, number: int, processes: list[int]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, number)


def _stop(group: int) -> None:
    """End the group and all descendants; returns when none is left."""
    _signal(group, signal.SIGTERM, descendants(os.getpid()))
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline:
        _reap()
        if not descendants(os.getpid()) and not _exists(group):
            return
        time.sleep(0.05)
    while descendants(os.getpid()) or _exists(group):
        _signal(group, signal.SIGKILL, descendants(os.getpid()))
        _reap()
        time.sleep(0.05)


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def main(argv: list[str]) -> int:
    """Run the command until it ends or the parent is gone; returns its exit code."""
    link = socket.socket(fileno=int(argv[0]))
    link.set_inheritable(False)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        child = subprocess.Popen(
            argv[2:],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )
    except OSError as error:
        print(f"{argv[2]}: {error.strerror}", file=sys.stderr)
        return 127
    with contextlib.suppress(OSError):
        link.sendall(f"{child.pid}\n".encode())
    code: int | None = None
    while code is None and not asked:
        readable, _, _ = select.select([link], [], [], 0.1)
        if readable:
            try:
                alive = link.recv(64)
            except OSError:
                alive = b""
            if not alive:
                break
        code = _reap().get(child.pid)
    _stop(child.pid)
    if after := json.loads(argv[1]):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(after, stdin=subprocess.DEVNULL, timeout=AFTER_S, check=False)
    if code is None:
        return 143
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
