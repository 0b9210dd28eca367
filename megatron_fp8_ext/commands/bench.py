"""`megatron-fp8 bench ...`: measure on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_fp8_ext.files import write_atomically

app = typer.Typer(help="Measure kernels and conversions on this machine.", no_args_is_help=True)


@app.command()
def kernels(
    model: Annotated[str, typer.Option(help="shape: qwen2.5-1.5b or qwen2.5-7b")] = "qwen2.5-1.5b",
    tokens: Annotated[int | None, typer.Option(help="tokens of a microbatch")] = None,
    output: Annotated[Path, typer.Option(help="prefix of the .json and .md files")] = Path(
        "runs/bench-kernels"
    ),
    budget_ms: Annotated[float, typer.Option(help="device time for each measurement")] = 60.0,
    sweep: Annotated[bool, typer.Option(help="try several numbers of warps")] = False,
    only: Annotated[str, typer.Option(help="only kernels whose name contains this")] = "",
) -> None:
    """Casts, fused casts and the chunked loss, each beside a measured copy or GEMM."""
    from dataclasses import replace

    from megatron_fp8_ext.errors import UserError, unknown_name

    try:
        from megatron_fp8_ext.benchmark import kernels as bench
    except ImportError as error:
        raise UserError(f"bench needs {error.name}: pip install torch on a GPU machine") from error
    if model not in bench.SHAPES:
        raise unknown_name("--model", model, bench.SHAPES)
    if tokens is not None and tokens < 1:
        raise UserError(f"--tokens {tokens}: give it a positive number")
    shape = bench.SHAPES[model]
    record = bench.run(
        shape if tokens is None else replace(shape, tokens=tokens), budget_ms, sweep, only
    )
    _write(output, record, bench.markdown(record))


@app.command()
def convert(
    model: Annotated[str, typer.Option(help="shape: Qwen2.5-1.5B or Qwen2.5-7B")] = "Qwen2.5-7B",
    folder: Annotated[
        Path, typer.Option(help="scratch folder, three to four times the model; removed at the end")
    ] = Path("runs/bench-convert.scratch"),
    layers: Annotated[int | None, typer.Option(min=1, help="fewer than the model has")] = None,
    main_params: Annotated[
        bool, typer.Option(help="also a checkpoint with FP32 main parameters")
    ] = True,
    device: Annotated[str, typer.Option(help="of hf-to-fp8: auto, cpu or cuda")] = "auto",
    output: Annotated[Path, typer.Option(help="prefix of the .json and .md files")] = Path(
        "runs/bench-convert"
    ),
) -> None:
    """Time and peak memory of every conversion, on random weights of a released model's shape."""
    from megatron_fp8_ext.errors import UserError

    try:
        from megatron_fp8_ext.benchmark import conversion as bench
    except ImportError as error:
        raise UserError(f"bench convert needs {error.name}: pip install {error.name}") from error
    record = bench.run(model, folder, layers, main_params, device)
    _write(output, record, bench.markdown(record))


def _write(output: Path, record: dict[str, Any], text: str) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".json", json.dumps(record, indent=1) + "\n"), (".md", text)):
        write_atomically(output.with_name(output.name + suffix), content)
    print(text)
    print(f"{output}.json, {output}.md")
