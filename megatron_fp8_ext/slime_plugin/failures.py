"""What stopped a slime run, in one line, and a watch over rollout servers that nobody else watches.

slime waits for a rollout server without a limit: one that hangs holds the run for ever, one that died ends
it after 60 retries with a traceback of httpx. Servers that slime starts itself are watched by its
`--use-fault-tolerance`; those of `--rollout-external-engine-addrs` are watched here.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.slime_plugin.resumption import advice, last_size

# SGLang's own probe that generates a token: a server that hangs does not answer it.
_PROBE = "/health_generate"
_INTERVAL = 10.0
# A write that failed, as torch's writers tell it: they lose the system's reason.
_UNWRITTEN = ("CheckpointException", "inline_container.cc", "PytorchStreamWriter")
# slime's actor methods that write; a CheckpointException may also come from a load.
_WRITES = ("save_model()", "update_weights()")
# The main thread waits inside ray.get, which a signal's KeyboardInterrupt ends. Not SIGINT: a script's
# `python ... &` ignores that one.
_WAKE = signal.SIGUSR2


def _ray_logs(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "session_latest" / "logs"


def ailment(url: str, timeout: float) -> str | None:
    """Say what the rollout server at `url` does instead of generating a token; None if it generates.

    Args:
        url: of the server, without a path.
        timeout: seconds that the token may take.
    """
    try:
        urllib.request.urlopen(f"{url}{_PROBE}", timeout=timeout).close()
    except urllib.error.HTTPError as error:
        return f"answers {error.code} {error.reason} and generates nothing"
    except TimeoutError:  # it took the connection; one that takes none is a URLError
        return "takes requests and generates nothing"
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        return f"does not answer ({getattr(reason, 'strerror', None) or reason})"
    return None


class Watch:
    """A thread that interrupts this process when a rollout server stays silent.

    Attributes:
        reason: why it interrupted; None while all is well.
    """

    def __init__(
        self,
        urls: Sequence[str],
        patience: float,
        probe: Callable[[str, float], str | None] = ailment,
        interval: float = _INTERVAL,
    ) -> None:
        """Watch `urls`, each of which may be silent for `patience` seconds."""
        self.urls, self.patience, self.interval = list(urls), patience, interval
        self.reason: str | None = None
        self._probe = probe
        self._stop = threading.Event()
        self._firing = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        heard = dict.fromkeys(self.urls, time.monotonic())
        while not self._stop.wait(self.interval):
            for url in self.urls:
                found = self._probe(url, self.patience)
                if found is None:
                    heard[url] = time.monotonic()
                    continue
                silent = time.monotonic() - heard[url]
                if silent >= self.patience:
                    self._interrupt(f"rollout server {url} {found}, no token for {silent:.0f} s")
                    return

    def _interrupt(self, reason: str) -> None:
        main = threading.main_thread().ident
        with self._firing:
            if main is not None and not self._stop.is_set():
                self.reason = reason
                signal.pthread_kill(main, _WAKE)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Never interrupt from now on."""
        with self._firing:
            self._stop.set()


@contextlib.contextmanager
def watched(args: Any) -> Iterator[None]:
    """Within it, a silent external rollout server ends the run.

    Args:
        args: slime's arguments: `rollout_external_engine_addrs`, `rollout_patience` (seconds, 0: no watch).

    Raises:
        UserError: names the server and how long it was silent.
    """
    addresses = getattr(args, "rollout_external_engine_addrs", None) or []
    patience = float(getattr(args, "rollout_patience", None) or 0)
    if not addresses or not patience:
        yield
        return
    watch = Watch([a if "://" in a else f"http://{a}" for a in addresses], patience)
    before = signal.signal(_WAKE, signal.default_int_handler)
    watch.start()
    try:
        yield
    except KeyboardInterrupt:
        if watch.reason is None:
            raise
        raise UserError(
            f"{watch.reason}; see its log, start it again, then {advice(args)}"
        ) from None
    except Exception:
        # The server may have died and slime's retries ended before our patience did.
        ill = [(url, found) for url in watch.urls if (found := ailment(url, 5))]
        if not ill:
            raise
        raise UserError(
            f"rollout server {ill[0][0]} {ill[0][1]}; see its log, start it again, then {advice(args)}"
        ) from None
    finally:
        watch.stop()
        signal.signal(_WAKE, before)


def explain(error: BaseException, args: Any) -> UserError | None:
    """Return what a user should read in place of Ray's traceback; None where it is a bug.

    Args:
        error: what slime's `train` raised.
        args: slime's arguments.
    """
    chain = list(_causes(error))
    for seen in chain:
        if isinstance(seen, UserError):
            return UserError(str(getattr(seen, "cause", None) or seen).strip().splitlines()[-1])
    for seen in chain:
        text = f"{type(seen).__name__}: {seen}"
        full = getattr(seen, "errno", None) == errno.ENOSPC or "No space left on device" in text
        written = any(step in text for step in _WRITES)
        if full or (written and any(sign in text for sign in _UNWRITTEN)):
            return _unwritten(args, full)
    import ray

    for seen in chain:
        if isinstance(seen, ray.exceptions.OutOfMemoryError):
            return UserError(
                f"Ray killed a worker because the node ran out of memory; {advice(args)}"
            )
        if isinstance(seen, (ray.exceptions.ActorDiedError, ray.exceptions.WorkerCrashedError)):
            if getattr(seen, "_actor_init_failed", False):  # its constructor raised
                reason = str(seen).strip().splitlines()[-1].strip()
                return UserError(
                    f"an actor could not start: {reason}; mend it, then {advice(args)}"
                )
            return UserError(
                "an actor died in the middle of its work (killed, out of memory, or a crash of its process; "
                f"Ray's log: {_ray_logs(os.environ)}); {advice(args)}"
            )
    return None


def _unwritten(args: Any, full: bool) -> UserError:
    """Return what to read when a checkpoint or a push was not written; `full` where the system said why."""
    folder = Path(
        getattr(args, "save", None) or getattr(args, "update_weight_disk_dir", None) or "."
    )
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return UserError(f"{folder} cannot be written to ({error}); mend it, then {advice(args)}")
    if full or free < last_size(args):
        return UserError(
            f"no space left for {folder}: make room ({free / 1e6:.1f} MB are free), then {advice(args)}"
        )
    return UserError(
        f"a checkpoint could not be written to {folder} ({free / 1e6:.1f} MB are free; the log says what "
        f"failed); mend it, then {advice(args)}"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = getattr(seen, "cause", None) or seen.__cause__
