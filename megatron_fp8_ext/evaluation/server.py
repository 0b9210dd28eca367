"""An OpenAI-compatible server on 127.0.0.1: start it, wait for a real answer, restart it, stop it."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shlex
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.evaluation.process import Guarded

HOST = "127.0.0.1"
KINDS = ("sglang", "vllm", "transformers", "openai")
_BROKEN = 5  # internal errors in a row that no waiting will mend
_PORT_TAKEN = ("address already in use", "Address already in use", "port is already", "Errno 98")


@dataclass(frozen=True, kw_only=True)
class ServerSpec:
    """How to serve a model.

    Attributes:
        kind: one of KINDS; `openai` is a server that runs already, at `url`.
        model: folder of the checkpoint; None only for `openai`.
        name: the model's name in requests.
        url: base URL up to and with `/v1`, for `openai`.
        key: API key for `openai`; other kinds get a random one.
        python: the Python that has the server's package.
        port: 0 takes any free one.
        tensor_parallel: GPUs.
        extra: further arguments of the server.
        command: instead of a kind's own: words with {model} {name} {port} {key}.
        ready_s: seconds until the first answer must have come.
    """

    kind: str
    name: str
    model: Path | None = None
    url: str | None = None
    key: str = ""
    python: str = ""
    port: int = 0
    tensor_parallel: int = 1
    extra: tuple[str, ...] = ()
    command: str | None = None
    ready_s: float = 1800.0


def free_port() -> int:
    """Return a port on 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    """Raise a UserError where somebody listens on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"--port {port} is taken ({error.strerror}): leave --port out to get a free one"
            ) from error


def command(
    spec: ServerSpec, port: int, key: str, key_file: Path
) -> tuple[list[str], dict[str, str]]:
    """Return the command and the extra environment of a server.

    The key never stands on a command line, which every user of the machine can read, unless the
    user's own --server-command puts {key} there. SGLang and vLLM would fill what a request leaves out
    (top-k, min-p, repetition penalty) from the checkpoint's generation_config.json; they are told not
    to. The FP8 format they read from config.json.
    """
    model, tp = str(spec.model), str(spec.tensor_parallel)
    if spec.command is not None:
        try:
            values = {"model": model, "name": spec.name, "port": str(port), "key": key}
            words = [word.format(**values) for word in shlex.split(spec.command)]
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"--server-command: {error}: only {{model}} {{name}} {{port}} {{key}} are filled in"
            ) from error
        return [*words, *spec.extra], {"MEGATRON_FP8_EVAL_KEY": key}
    if spec.kind == "sglang":
        key_file.unlink(missing_ok=True)
        with open(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"api-key": key}, file)  # JSON is YAML, which --config reads
        words = [
            spec.python, "-m", "sglang.launch_server", "--config", str(key_file),
            "--model-path", model, "--served-model-name", spec.name, "--host", HOST,
            "--port", str(port), "--tp-size", tp, "--sampling-defaults", "openai",
        ]  # fmt: skip
        return [*words, *spec.extra], {}
    if spec.kind == "vllm":
        words = [
            spec.python, "-m", "vllm.entrypoints.cli.main", "serve", model,
            "--served-model-name", spec.name, "--host", HOST, "--port", str(port),
            "--tensor-parallel-size", tp, "--generation-config", "vllm",
        ]  # fmt: skip
        return [*words, *spec.extra], {"VLLM_API_KEY": key}
    words = [
        spec.python, "-m", "transformers.cli.transformers", "serve", model,
        "--host", HOST, "--port", str(port),
    ]  # fmt: skip
    return [*words, *spec.extra], {"HF_HUB_OFFLINE": "1"}


class NotReady(Exception):
    """The server gave no answer yet; the message says what it said instead."""


def generate(url: str, key: str, name: str, timeout_s: float) -> None:
    """Have the model generate one token through the chat route.

    Not /health: SGLang's answers before the model can. Not /v1/models: it answers without a model.

    Raises:
        NotReady: no answer yet.
        UserError: an answer that waiting will not change (wrong key, name or request).
    """
    body = {
        "model": name,
        "messages": [{"role": "user", "content": "Say yes."}],
        "max_tokens": 1,
        "temperature": 0.0,
    }
    request = urllib.request.Request(
        f"{url}/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            choices = json.load(answer)["choices"]
    except urllib.error.HTTPError as error:
        said = error.read(500).decode("utf-8", errors="replace").strip()
        if error.code in (400, 401, 403, 404, 422):
            raise UserError(f"the server at {url} answers {error.code}: {said}") from error
        raise NotReady(f"{error.code}: {said}") from error
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise NotReady(str(error)) from error
    if not choices:
        raise NotReady("an answer without choices")


def served_name(url: str, key: str) -> str:
    """Return the one model that a running server offers.

    Raises:
        UserError: it does not answer, or offers none or several.
    """
    request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as answer:
            names = [model["id"] for model in json.load(answer)["data"]]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{url}/models gives no list of models: {error}; give --name") from error
    if len(names) != 1:
        raise UserError(f"{url} offers {', '.join(names) or 'no model'}: choose with --name")
    return str(names[0])


@dataclass
class Server:
    """A server under our hand; `openai` servers are only talked to."""

    spec: ServerSpec
    folder: Path
    keep_open: Sequence[int] = ()
    url: str = ""
    key: str = ""
    starts: int = 0
    process: Guarded | None = field(default=None, repr=False)

    @property
    def log(self) -> Path:
        """File with the server's output."""
        return self.folder / "server.log"

    def start(self, waiting: Callable[[float], None] = lambda seconds: None) -> None:
        """Start the server and wait for a real generation; calls `waiting(seconds)` meanwhile.

        Raises:
            UserError: it stops, or gives no answer in time; with the end of its log.
        """
        if self.spec.kind == "openai":
            assert self.spec.url is not None
            self.url, self.key = self.spec.url, self.spec.key
            self._wait(waiting)
            return
        for attempt in range(3):
            port = self.spec.port or free_port()
            if self.spec.port:
                check_port(port)
            self.key = secrets.token_urlsafe(24)
            self.url = f"http://{HOST}:{port}/v1"
            key_file = self.folder / ".server-key.yaml"
            words, extra = command(self.spec, port, self.key, key_file)
            self.process = Guarded(
                words, self.log, env={**os.environ, **extra}, keep_open=self.keep_open
            )
            self.starts += 1
            try:
                self._wait(waiting)
                return
            except UserError:
                said = self.process.tail(20)
                self.stop()
                lost_race = any(x in said for x in _PORT_TAKEN) and not self.spec.port
                if not lost_race or attempt == 2:
                    raise
            finally:
                key_file.unlink(missing_ok=True)

    def _wait(self, waiting: Callable[[float], None]) -> None:
        began, reason, broken = time.monotonic(), "no answer", 0
        while (waited := time.monotonic() - began) < self.spec.ready_s:
            waiting(waited)
            self.raise_if_dead("before it was ready")
            try:
                generate(self.url, self.key, self.spec.name, max(self.spec.ready_s - waited, 1))
                self.raise_if_dead("before it was ready")
                return
            except NotReady as error:
                reason = str(error)
                broken = broken + 1 if reason.startswith("500") else 0
            if broken >= _BROKEN:
                break
            time.sleep(0.5)
        end = f"; the end of {self.log}: {self.process.tail()}" if self.process else ""
        if broken:
            raise UserError(f"the server at {self.url} fails to generate ({reason}){end}")
        raise UserError(
            f"the server at {self.url} was not ready after {self.spec.ready_s:.0f} s ({reason}): "
            f"raise --server-timeout if it was still loading{end}"
        )

    def alive(self) -> bool:
        """Whether the process runs; always true for a server that is not ours."""
        return self.process is None or self.process.poll() is None

    def raise_if_dead(self, when: str) -> None:
        """Raise a UserError with the end of the log where the process has stopped."""
        if self.process is not None and (code := self.process.poll()) is not None:
            raise UserError(
                f"the {self.spec.kind} server stopped with exit code {code} {when}; the end of "
                f"{self.log}: {self.process.tail()}"
            )

    def stop(self) -> None:
        """Stop the server and all its processes. Idempotent."""
        if self.process is not None:
            self.process.stop()
            self.process = None
