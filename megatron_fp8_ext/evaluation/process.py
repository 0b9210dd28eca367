"""Child processes that end with us, whatever ends us; see guard.py."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_GUARD = Path(__file__).with_name("guard.py")


class Guarded:
    """A running command in a process group of its own, its output in a log file.

    Attributes:
        pid: the command's process id; 0 where it could not be started.
        log: where its output goes, appended.
    """

    def __init__(
        self,
        argv: Sequence[str],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        keep_open: Sequence[int] = (),
        after: Sequence[str] = (),
    ) -> None:
        """Start `argv`.

        Args:
            argv: the command.
            log: where its output goes.
            env: its environment.
            keep_open: descriptors (a lock) that stay open until all is stopped.
            after: command that the guard runs once all is stopped, however that came about.
        """
        self.log = log
        self._link, theirs = socket.socketpair()
        after_words = json.dumps(list(after))
        with log.open("ab") as output, theirs:
            self.start_of_log = output.tell()
            self._guard = subprocess.Popen(
                [sys.executable, "-I", str(_GUARD), str(theirs.fileno()), after_words, *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(env) if env is not None else None,
                pass_fds=(theirs.fileno(), *keep_open),
                start_new_session=True,
            )
        first = b""
        while not first.endswith(b"\n"):
            part = self._link.recv(64)
            if not part:
                break
            first += part
        self.pid = int(first or b"0")

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        code = self._guard.poll()
        if code is not None and code < 0 and self.pid:  # the guard itself was killed
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        return code

    def stop(self) -> None:
        """Stop the command and all it started; returns when they are gone. Idempotent."""
        if self._guard.poll() is None:
            self._guard.terminate()
        self._guard.wait()
        self.poll()
        self._link.close()

    def tail(self, lines: int = 5) -> str:
        """Return the last lines that this command wrote, joined into one."""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(max(self.start_of_log, self.log.stat().st_size - 20_000))
            text = _COLOUR.sub("", file.read().decode("utf-8", errors="replace"))
            kept = [x.strip() for x in text.splitlines() if x.strip() and "it/s]" not in x]
            return " | ".join(x[:300] for x in kept[-lines:]) or "no output"
        return "no output"
