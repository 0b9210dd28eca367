"""One unattended evaluation: lock, checks, server, evalscope, restarts, results."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.evaluation import (
    container,
    datasets,
    evalscope,
    model,
    report,
    results,
    sandbox,
)
from megatron_fp8_ext.evaluation.benchmarks import Benchmark
from megatron_fp8_ext.evaluation.datasets import Data
from megatron_fp8_ext.evaluation.evalscope import Settings
from megatron_fp8_ext.evaluation.process import Guarded
from megatron_fp8_ext.evaluation.server import Server, ServerSpec
from megatron_fp8_ext.files import write_atomically

_POLL_S = 0.5
_LOG_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for.

    Attributes:
        benchmarks: with their settings, in order.
        spec: the server.
        output: folder of everything that is written; the same folder resumes.
        data: `--data` places.
        download: hub to download from; None keeps evalscope offline.
        pass_at: the k of pass@k.
        python: of evalscope's environment.
        restarts: attempts in a row that finish no answer before giving up.
    """

    benchmarks: tuple[tuple[Benchmark, Settings], ...]
    spec: ServerSpec
    output: Path
    data: tuple[str, ...] = ()
    download: str | None = None
    pass_at: tuple[int, ...] = ()
    python: Path
    restarts: int = 3


@dataclass
class _Part:
    """One benchmark on its way."""

    benchmark: Benchmark
    settings: Settings
    work: Path
    data: Data | None
    checked: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return int(self.checked["samples"])

    @property
    def complete(self) -> bool:
        return len(results.read(self.work)) >= self.total


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold the folder's lock. The guards hold it too, until a killed run's processes are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"--output {folder}: another evaluation is using it; wait or choose another"
                    ) from error
                time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)


def run(request: Request, console: Console) -> dict[str, Any]:
    """Evaluate; returns what results.json holds. Everything started here has stopped on return.

    Raises:
        UserError: anything the user can mend; what is finished stays and is taken up again.
    """
    for benchmark, settings in request.benchmarks:
        for k in request.pass_at:
            benchmark.allows_pass_at(k, settings.samples)
        if benchmark.runs_code and (problem := sandbox.problem()):
            raise UserError(
                f"{benchmark.name} runs programs that the model writes, only in a container without "
                f"network: {problem}; mend that or leave {benchmark.name} out"
            )
    versions = evalscope.installed(request.python)
    if versions["evalscope"] != evalscope.VERSION:
        console.print(
            f"evalscope {versions['evalscope']} is used; tested with {evalscope.VERSION}",
            style="yellow",
        )
    checkpoint = model.read(request.spec.model) if request.spec.model is not None else None
    if checkpoint is not None:
        for benchmark, settings in request.benchmarks:
            model.check_context(checkpoint, benchmark.name, settings.max_tokens)
    with _locked(request.output) as lock:
        parts = [_prepare(request, each, settings) for each, settings in request.benchmarks]
        _check_manifest(request, parts, checkpoint, versions)
        for part in parts:
            call = _call(request, part)
            offline = request.download is None
            part.checked = evalscope.check(request.python, call, part.work, offline)
            if checkpoint is not None:
                model.check_prompts(checkpoint, part.benchmark.name, part.checked["prompts"])
        server = Server(request.spec, request.output, keep_open=(lock,))
        try:
            for part in parts:
                if not part.complete:
                    _answer(request, part, server, lock, console)
        finally:
            server.stop()
        return _finish(request, parts, checkpoint, versions, server)


def _call(request: Request, part: _Part) -> dict[str, Any]:
    return evalscope.task(
        part.benchmark,
        part.settings,
        served_name=request.spec.name,
        data=part.data.folder if part.data else None,
        work=part.work,
        hub=request.download or "modelscope",
    )


def _prepare(request: Request, benchmark: Benchmark, settings: Settings) -> _Part:
    work = (request.output / benchmark.name).absolute()
    data = None
    if request.data or request.download is None:
        files = datasets.find(benchmark, request.data)
        folder = (request.output / "data" / benchmark.name).absolute()
        data = datasets.prepare(benchmark, files, folder, request.python)
    return _Part(benchmark, settings, work, data)


def _check_manifest(
    request: Request,
    parts: list[_Part],
    checkpoint: model.Model | None,
    versions: dict[str, str],
) -> None:
    """Refuse to resume with another model, other settings or other data; else write run.json."""
    file = request.output / "run.json"
    ours: dict[str, Any] = {
        "model": checkpoint.identity if checkpoint else request.spec.url,
        "name": request.spec.name,
        "versions": versions,
    }
    for part in parts:
        asked = {**asdict(part.settings), "data": part.data.sha256 if part.data else "downloaded"}
        del asked["batch"]  # changes no answer
        ours[part.benchmark.name] = asked
    earlier = json.loads(file.read_text()) if file.is_file() else {}
    for key, value in earlier.items():
        if key in ours and ours[key] != value:
            what, old, new = key, value, ours[key]
            if isinstance(old, dict):
                inner = next(k for k in {**old, **new} if old.get(k) != new.get(k))
                what, old, new = f"{key}: {inner}", old.get(inner), new.get(inner)
            raise UserError(
                f"--output {request.output} holds an evaluation with another {what} ({old}, now {new}): "
                "choose another --output, or delete that folder"
            )
    write_atomically(file, json.dumps({**earlier, **ours}, indent=1) + "\n")


def _answer(request: Request, part: _Part, server: Server, lock: int, console: Console) -> None:
    """Run one benchmark to its end, through crashes of the server and of evalscope."""
    name, fruitless = part.benchmark.name, 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=not console.is_terminal) as bar:
        shown = bar.add_task(name, total=part.total, note="")
        while not part.complete:
            before = results.finished(part.work)
            bar.update(shown, completed=before, note="")
            try:
                if server.url == "" or not server.alive():
                    server.stop()
                    server.start(
                        lambda s: bar.update(shown, note=f"waiting for the server, {s:.0f} s")
                    )
                stopped = _once(request, part, server, lock, bar, shown)
            except UserError as error:
                # A server that never answered will not be mended by trying again.
                if server.starts <= 1 or fruitless >= request.restarts:
                    raise
                stopped = str(error)
            if part.complete:
                return
            fruitless = 0 if results.finished(part.work) > before else fruitless + 1
            if fruitless >= request.restarts:
                raise UserError(
                    f"{name}: gave up after {fruitless} attempts without a new answer: {stopped}; run "
                    "the same command again to resume"
                )
            console.print(f"{name}: {stopped}; trying again", style="yellow", soft_wrap=True)


def _once(
    request: Request, part: _Part, server: Server, lock: int, bar: Progress, shown: Any
) -> str:
    """Run evalscope once; returns why it ended."""
    environment = evalscope.environment(part.work, request.download is None)
    environment |= {"EVALSCOPE_BASE_URL": server.url, "EVALSCOPE_API_KEY": server.key or "EMPTY"}
    words = evalscope.run_command(request.python, part.work, _call(request, part))
    process = Guarded(
        words,
        part.work / "evalscope.log",
        env=environment,
        keep_open=(lock,),
        after=sandbox.removal(part.work) if part.benchmark.runs_code else (),
    )
    told = began = time.monotonic()
    start = results.finished(part.work)
    try:
        while process.poll() is None:
            time.sleep(_POLL_S)
            done = results.finished(part.work)
            bar.update(shown, completed=done, note="")
            if not server.alive():
                return f"the server stopped ({server.process.tail(2) if server.process else ''})"
            if not bar.console.is_terminal and time.monotonic() - told > _LOG_EVERY_S:
                told = time.monotonic()
                rate = (done - start) / (told - began)
                left = (
                    f"{(part.total - done) / rate / 60:.0f} min left" if rate else "no answer yet"
                )
                bar.console.print(f"{part.benchmark.name}: {done}/{part.total}, {left}")
    finally:
        process.stop()
    if not server.alive():
        return f"the server stopped ({server.process.tail(2) if server.process else ''})"
    said = process.tail(50).split(" | ")
    reasons = [line for line in said if line.startswith(container.FAILED)] or said[-2:]
    return f"evalscope stopped with exit code {process.poll()} ({' | '.join(reasons)})"


def _sampling_warning(spec: ServerSpec, checkpoint: model.Model | None) -> list[str]:
    """What a server that we could not tell otherwise may have added to the requests."""
    told = spec.kind in ("sglang", "vllm") and spec.command is None
    if told or checkpoint is None or not checkpoint.sampling:
        return []
    said = ", ".join(f"{name} {value}" for name, value in checkpoint.sampling.items())
    return [
        f"generation_config.json says {said}, which this server may have applied: start it with "
        "neutral defaults, or take these lines out"
    ]


def _finish(
    request: Request,
    parts: list[_Part],
    checkpoint: model.Model | None,
    versions: dict[str, str],
    server: Server,
) -> dict[str, Any]:
    spec = request.spec
    found: dict[str, Any] = {}
    for part in parts:
        benchmark, settings = part.benchmark, part.settings
        answers = results.read(part.work)
        scored = results.score(
            benchmark.name, answers, part.checked["hashes"], settings.samples, request.pass_at
        )
        found[benchmark.name] = {
            **results.to_json(scored),
            "settings": asdict(settings),
            "data": ", ".join(map(str, part.data.source)) if part.data else request.download,
            "published": dict(benchmark.published),
            "differences": list(benchmark.differences),
            "warnings": [
                *results.warnings(
                    scored, settings.max_tokens, benchmark.max_tokens, benchmark.questions
                ),
                *_sampling_warning(spec, checkpoint),
            ],
        }
    everything = {
        "model": {
            "name": str(spec.model or spec.name),
            "identity": checkpoint.identity if checkpoint else None,
            "quantization": checkpoint.quantization if checkpoint else None,
        },
        "server": {
            "kind": "command" if spec.command else spec.kind,
            "arguments": spec.command or list(spec.extra),
            "tensor_parallel": spec.tensor_parallel,
            "starts": server.starts,
        },
        "versions": versions,
        "benchmarks": found,
    }
    report.save(request.output, everything)
    return everything
