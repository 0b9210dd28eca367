"""`megatron-fp8 eval ...`: evaluate a checkpoint through evalscope, and compare two."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from megatron_fp8_ext.errors import UserError


class _RunByDefault(TyperGroup):
    """`eval aime24 ...` means `eval run aime24 ...`, `--server openai URL` adds `--url`."""

    default = "run"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = [self.default, *args]
        for place in range(len(args) - 2, 0, -1):
            if args[place : place + 1] == ["openai"] and args[place - 1] == "--server":
                if args[place + 1].startswith(("http://", "https://")):
                    args = [*args[: place + 1], "--url", *args[place + 1 :]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    help="Evaluate: `eval aime24,gpqa --model DIR`, `eval compare A B`.",
    no_args_is_help=True,
)


@app.command()
def run(
    benchmarks: Annotated[str, typer.Argument(help="aime24,aime25,gpqa,livecodebench")],
    model: Annotated[Path | None, typer.Option(help="Hugging Face folder to serve")] = None,
    server: Annotated[
        str, typer.Option(help="sglang, vllm, transformers or openai URL")
    ] = "sglang",
    url: Annotated[str | None, typer.Option(help="of a running server, up to /v1 (openai)")] = None,
    name: Annotated[str | None, typer.Option(help="the model's name at the server")] = None,
    data: Annotated[list[str] | None, typer.Option(help="FOLDER or NAME=FILE, repeatable")] = None,
    output: Annotated[Path | None, typer.Option(help="results; the same folder resumes")] = None,
    samples: Annotated[int | None, typer.Option(help="answers to each question")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="longest answer")] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    batch: Annotated[int | None, typer.Option(help="requests in flight")] = None,
    limit: Annotated[int | None, typer.Option(help="only the first N questions")] = None,
    pass_at: Annotated[str, typer.Option(help="the k of pass@k, such as 1,8")] = "1",
    system_prompt: Annotated[str | None, typer.Option()] = None,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs of the server")] = 1,
    server_args: Annotated[str, typer.Option(help="further arguments of the server")] = "",
    server_command: Annotated[
        str | None, typer.Option(help="own server: words with {model} {name} {port} {key}")
    ] = None,
    server_python: Annotated[str, typer.Option(help="Python with the server")] = sys.executable,
    server_timeout: Annotated[float, typer.Option(help="seconds to the first answer")] = 1800.0,
    port: Annotated[int, typer.Option(help="0: a free one")] = 0,
    evalscope: Annotated[str | None, typer.Option(help="environment with evalscope")] = None,
    download: Annotated[
        str | None, typer.Option(help="modelscope or huggingface; without it, nothing is fetched")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="print evalscope's call and the server's")] = False,
) -> None:
    """Serve a checkpoint, ask it every question k times, and score the answers.

    Settings left out are the reference's. A run that was stopped goes on where it was when the same
    command is given again. An openai server's key is read from OPENAI_API_KEY.
    """
    from megatron_fp8_ext.evaluation import benchmarks as presets
    from megatron_fp8_ext.evaluation import evalscope as environment
    from megatron_fp8_ext.evaluation import report, session

    names = dict.fromkeys(each.strip() for each in benchmarks.split(",") if each.strip())
    chosen = [presets.get(each) for each in names]
    given = {
        "samples": samples, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p,
        "batch": batch, "limit": limit, "system_prompt": system_prompt,
    }  # fmt: skip
    if download not in (None, "modelscope", "huggingface"):
        raise UserError(f"--download {download}: modelscope or huggingface")
    settings = tuple((each, environment.settings(each, **given)) for each in chosen)
    if not settings:
        raise UserError("no benchmark given: aime24,aime25,gpqa,livecodebench")
    spec = _server(
        model, server, url, name, tensor_parallel, server_args, server_command, server_python,
        server_timeout, port, dry_run,
    )  # fmt: skip
    folder = output or Path("runs/eval") / (model.absolute().name if model else "served")
    if dry_run:
        _dry_run(settings, spec, folder)
        if model is None and url is None:
            print(
                "# problem: --model is missing: add the folder to serve (or --url of a running server)"
            )
        return
    request = session.Request(
        benchmarks=settings,
        spec=spec,
        output=folder,
        data=tuple(data or ()),
        download=download,
        pass_at=_numbers(pass_at),
        python=environment.python_of(evalscope),
    )
    console = Console(stderr=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        found = session.run(request, console)
    except KeyboardInterrupt:
        console.print("stopped; the same command resumes")
        raise SystemExit(130) from None
    Console().print(report.table(found["benchmarks"]))
    for each, result in found["benchmarks"].items():
        for text in result["warnings"]:
            console.print(f"{each}: {text}", style="yellow", soft_wrap=True)
    print(f"{folder}/results.md, {folder}/results.json")


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(each) for each in text.split(",") if each.strip()}))
    except ValueError:
        raise UserError(f"--pass-at {text}: whole numbers with commas, such as 1,8") from None


def _server(
    model: Path | None,
    kind: str,
    url: str | None,
    name: str | None,
    tensor_parallel: int,
    extra: str,
    command: str | None,
    python: str,
    timeout: float,
    port: int,
    dry_run: bool,
) -> Any:
    from megatron_fp8_ext.errors import unknown_name
    from megatron_fp8_ext.evaluation import server as serving

    if kind not in serving.KINDS:
        raise unknown_name("server", kind, serving.KINDS)
    if url is not None:
        key = os.environ.get("OPENAI_API_KEY", "EMPTY")
        url = url.rstrip("/")
        found = name or serving.served_name(url, key)
        return serving.ServerSpec(
            kind="openai", name=found, model=model, url=url, key=key, ready_s=timeout
        )
    if kind == "openai":
        raise UserError(
            "--server openai needs a URL, such as --server openai http://127.0.0.1:8000/v1"
        )
    if model is None and dry_run:
        model = Path("/path/to/model")
    elif model is None:
        raise UserError("--model is missing: the folder to serve (or --url of a running server)")
    elif not model.is_dir():
        raise UserError(f"--model {model}: no such folder; nothing is downloaded from a model hub")
    if port:
        serving.check_port(port)
    model = model.absolute()
    # transformers serve answers to the folder's name only.
    usual = str(model) if kind == "transformers" or command else model.name
    return serving.ServerSpec(
        kind=kind,
        name=name or usual,
        model=model,
        python=python,
        port=port,
        tensor_parallel=tensor_parallel,
        extra=tuple(shlex.split(extra)),
        command=command,
        ready_s=timeout,
    )


def _dry_run(settings: Any, spec: Any, folder: Path) -> None:
    import json
    import tempfile

    from megatron_fp8_ext.evaluation import evalscope as environment
    from megatron_fp8_ext.evaluation import server as serving

    calls = [
        environment.task(
            benchmark,
            chosen,
            served_name=spec.name,
            data=folder / "data" / benchmark.name,
            work=folder / benchmark.name,
        )
        for benchmark, chosen in settings
    ]
    print(json.dumps(calls, indent=1))
    if spec.kind != "openai":
        with tempfile.TemporaryDirectory() as place:
            words, extra = serving.command(
                spec, spec.port or serving.free_port(), "KEY", Path(place) / "key.yaml"
            )
        print(" ".join([*(f"{k}={v}" for k, v in extra.items()), *map(shlex.quote, words)]))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="results of the baseline, such as BF16")],
    b: Annotated[Path, typer.Argument(help="results of the other, such as FP8")],
    level: Annotated[float, typer.Option(help="of the confidence interval")] = 0.95,
) -> None:
    """B minus A on the same prompts: paired difference with its confidence interval."""
    from megatron_fp8_ext.evaluation import compare as comparing
    from megatron_fp8_ext.evaluation import report

    found = comparing.compare(comparing.load(a), comparing.load(b), level)
    Console().print(report.differences(found))


@app.command()
def setup(
    into: Annotated[Path | None, typer.Option(help="another folder")] = None,
) -> None:
    """Make evalscope's own environment once (pip downloads about 130 packages, 1.2 GB)."""
    from megatron_fp8_ext.evaluation import evalscope as environment

    folder = into or environment.managed_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    python = environment.set_up(folder.absolute())
    print(f"{python}: evalscope {environment.installed(python)['evalscope']}")
