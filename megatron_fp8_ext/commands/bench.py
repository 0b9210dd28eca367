"""`megatron-fp8 bench ...`: measure on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_fp8_ext.files import write_atomically

# Trains on any machine in seconds: the plumbing can be tried without a GPU.
TINY: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
app = typer.Typer(help="Measure steps, kernels and conversions here.", no_args_is_help=True)


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
    bench, shape = _shape(model, tokens)
    record = bench.run(shape, budget_ms, sweep, only)
    _write(output, record, bench.markdown(record))


@app.command()
def gemm(
    model: Annotated[str, typer.Option(help="shape: qwen2.5-1.5b or qwen2.5-7b")] = "qwen2.5-1.5b",
    tokens: Annotated[int | None, typer.Option(help="tokens of a microbatch")] = None,
    output: Annotated[Path, typer.Option(help="prefix of the .json and .md files")] = Path(
        "runs/bench-gemm"
    ),
    budget_ms: Annotated[float, typer.Option(help="device time for each measurement")] = 60.0,
    only: Annotated[str, typer.Option(help="only products whose name contains this")] = "",
) -> None:
    """The three products of each linear layer, in BF16 and block-scaled FP8."""
    bench, shape = _shape(model, tokens)
    record = bench.run(shape, budget_ms, False, only, bench.gemm_cases)
    _write(output, record, bench.markdown(record))


@app.command()
def step(
    model: Annotated[str, typer.Option(help="qwen2.5-1.5b, qwen2.5-7b or tiny")] = "qwen2.5-1.5b",
    seq_length: Annotated[int, typer.Option(help="tokens of a sequence")] = 8192,
    micro_batch_size: Annotated[int, typer.Option(help="sequences of a micro-batch")] = 2,
    micro_batches: Annotated[int, typer.Option(help="micro-batches of a step")] = 1,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs, with sequence parallelism")] = 1,
    compare: Annotated[
        str, typer.Option(help="sides, each with options: bf16+chunked,te-blockwise,infir2")
    ] = "bf16,te-blockwise,infir2",
    iterations: Annotated[int, typer.Option(help="iterations that count")] = 10,
    warm_up: Annotated[int, typer.Option(help="iterations before them")] = 4,
    skip_optimizer: Annotated[
        bool, typer.Option("--skip-optimizer", help="no optimizer step, no memory for its moments")
    ] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="also where one step's device time goes, by kernel")
    ] = False,
    timeout: Annotated[float, typer.Option(help="seconds for each side")] = 600.0,
    output: Annotated[
        Path, typer.Option(help="prefix of the .json, .md, .svg and .log files")
    ] = Path("runs/bench-step"),
) -> None:
    """A training step in Megatron's loop: forward, backward, optimizer and memory, side by side."""
    from megatron_fp8_ext import presets
    from megatron_fp8_ext.benchmark import device_time
    from megatron_fp8_ext.benchmark import sides as names
    from megatron_fp8_ext.benchmark import step as bench
    from megatron_fp8_ext.errors import UserError, unknown_name
    from megatron_fp8_ext.launch import architecture

    released = {name.lower(): name for name in ("Qwen2.5-1.5B", "Qwen2.5-7B")}
    if model not in released and model != "tiny":
        raise unknown_name("--model", model, ("tiny", *released))
    facts = TINY if model == "tiny" else presets.model_facts(released[model])
    what = bench.Step(
        model=model,
        architecture=architecture.flags(facts, max(tensor_parallel, 1)),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        micro_batches=micro_batches,
        tensor_parallel=tensor_parallel,
        iterations=iterations,
        warm_up=warm_up,
        skip_optimizer=skip_optimizer,
        kernels=kernels,
    )
    sides = names.parse(compare)
    output.parent.mkdir(parents=True, exist_ok=True)
    records, summaries, failures = [], [], []
    for side in sides:
        log = output.with_name(f"{output.name}-{side.name}.log")
        print(f"{side.name} ...", flush=True)
        try:
            records.append(bench.measure(what, side, log, timeout))
        except UserError as error:  # a side that does not fit in memory must not cost the others
            failures.append(str(error))
            continue
        summaries.append(bench.summarize(records[-1]))
    if not records:
        raise UserError("; ".join(failures))
    text = bench.markdown(what, records[0]["versions"], summaries)
    if kernels:
        text += "\n" + device_time.markdown([(r["side"], r["kernels"]) for r in records])
    drawn = bench.picture(summaries, output.with_name(output.name + ".svg"))
    _write(output, {"step": vars(what), "sides": summaries, "records": records}, text)
    if not drawn:
        print("no picture: pip install matplotlib")
    if failures:
        raise UserError("; ".join(failures))


def _shape(model: str, tokens: int | None) -> tuple[Any, Any]:
    """The module that measures kernels, and the shape to measure."""
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
    return bench, shape if tokens is None else replace(shape, tokens=tokens)


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
