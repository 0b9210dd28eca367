"""`megatron-fp8 convert ...`: checkpoints between Megatron, Hugging Face and FP8."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from megatron_fp8_ext.checkpoint.report import Progress, Report

app = typer.Typer(
    help="Checkpoints between Megatron, Hugging Face and FP8 (docs/conversion.md).",
    no_args_is_help=True,
)

_Out = Annotated[Path, typer.Argument(metavar="OUT", help="output folder; must not exist")]
_ShardSize = Annotated[float, typer.Option(help="largest shard of the output, GB")]
_TP = Annotated[
    int, typer.Option("--tensor-model-parallel-size", min=1, help="of the training run")
]


@app.command("megatron-to-hf")
def megatron_to_hf(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="what --save named")],
    out: _Out,
    hf_reference: Annotated[
        Path, typer.Option(help="model folder: its config.json and tokenizer, weights not needed")
    ],
    ckpt_step: Annotated[str | None, typer.Option(help="iteration; the latest without it")] = None,
    main_params: Annotated[
        bool, typer.Option(help="read the FP32 main parameters where the checkpoint has them")
    ] = True,
    shard_size: _ShardSize = 5.0,
) -> None:
    """A torch_dist checkpoint, saved at any TP and PP, to a BF16 Hugging Face folder."""
    from megatron_fp8_ext.checkpoint import megatron

    with _bar("megatron to hf") as progress:
        report = megatron.megatron_to_hf(
            checkpoint, out, hf_reference, step=ckpt_step, use_main_params=main_params,
            shard_bytes=_bytes(shard_size), progress=progress,
        )  # fmt: skip
    _print(report)


@app.command("hf-to-megatron")
def hf_to_megatron(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="model folder, or a .gguf file")],
    out: _Out,
    tensor_model_parallel_size: _TP = 1,
) -> None:
    """A Hugging Face folder (or GGUF file) to a checkpoint for --load, at any TP and PP.

    Prints the flags of the model's architecture and writes them to OUT/megatron_flags.txt.
    """
    from megatron_fp8_ext.checkpoint import megatron

    with _model_folder(source, out) as folder, _bar("hf to megatron") as progress:
        report = megatron.hf_to_megatron(
            folder, out, tensor_parallel=tensor_model_parallel_size, progress=progress
        )
    _print(report)
    print(f"start training with: --load {out} $(cat {out / megatron.FLAGS_FILE})")


@app.command("hf-to-fp8")
def hf_to_fp8(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="BF16 model folder")],
    out: _Out,
    scale_format: Annotated[
        str, typer.Option(help="e8m0: powers of two (infir2); fp32 (infir2-rl)")
    ] = "e8m0",
    device: Annotated[
        str, typer.Option(help="where to cast: auto, cpu or cuda; same codes")
    ] = "auto",
    tensor_model_parallel_size: _TP = 1,
    shard_size: _ShardSize = 5.0,
) -> None:
    """Block-scaled E4M3 (128x128) for serving: transformers, SGLang, vLLM."""
    from megatron_fp8_ext.checkpoint import fp8
    from megatron_fp8_ext.errors import UserError

    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: choose auto, cpu or cuda")
    with _bar("hf to fp8") as progress:
        report = fp8.hf_to_fp8(
            source, out, scale_format=scale_format, device=device,  # type: ignore[arg-type]
            tensor_parallel=tensor_model_parallel_size, shard_bytes=_bytes(shard_size),
            progress=progress,
        )  # fmt: skip
    _print(report)


@app.command("fp8-to-hf")
def fp8_to_hf(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="block-scaled FP8 model folder")],
    out: _Out,
    shard_size: _ShardSize = 5.0,
) -> None:
    """The BF16 values of an FP8 folder (exact for power-of-two scales), any widths."""
    from megatron_fp8_ext.checkpoint import fp8

    with _bar("fp8 to hf") as progress:
        report = fp8.fp8_to_hf(source, out, shard_bytes=_bytes(shard_size), progress=progress)
    _print(report)


@app.command("gguf-to-hf")
def gguf_to_hf(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="a .gguf file")],
    out: _Out,
) -> None:
    """A GGUF file, dequantized, as a BF16 Hugging Face folder with its tokenizer."""
    from megatron_fp8_ext.checkpoint import gguf

    _print(gguf.gguf_to_hf(source, out))


@app.command()
def verify(
    a: Annotated[Path, typer.Argument(metavar="A", help="Megatron checkpoint or model folder")],
    b: Annotated[Path, typer.Argument(metavar="B", help="the other one, any format")],
    hf_reference: Annotated[
        Path | None, typer.Option(help="model folder, where neither A nor B has a config.json")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="also compare the logits on this text")] = None,
    bitwise: Annotated[
        bool, typer.Option(help="exit 1 unless every tensor is equal bit for bit")
    ] = False,
    min_sqnr: Annotated[
        float | None, typer.Option(help="exit 1 if a tensor is below, in dB")
    ] = None,
    every: Annotated[
        bool, typer.Option("--every", help="a line for each tensor, equal ones too")
    ] = False,
) -> None:
    """Compare two checkpoints tensor by tensor, as values (FP8 dequantized) in Hugging Face names."""
    from rich.table import Table

    from megatron_fp8_ext.checkpoint import compare

    with _bar("verify") as progress:
        result = compare.compare(a, b, hf_reference, progress=progress)
    table = Table("tensor", "max error", "SQNR dB", "bitwise", box=None)
    rows = result.rows if every else [row for row in result.rows if not row.bitwise]
    shown = rows if every else sorted(rows, key=lambda row: row.sqnr_db)[:20]
    for row in shown:
        table.add_row(
            row.name, f"{row.max_error:.3g}", f"{row.sqnr_db:.1f}", "yes" if row.bitwise else "no"
        )
    if shown:
        Console(width=120).print(table)
        if len(rows) > len(shown):
            print(f"... and {len(rows) - len(shown)} more that differ less (--every shows all)")
    for line in result.summary():
        print(line)
    if prompt is not None:
        from megatron_fp8_ext.checkpoint import logits

        for line in logits.compare(a, b, prompt, hf_reference).summary():
            print(line)
    if not result.passes(bitwise=bitwise, min_sqnr=min_sqnr):
        raise typer.Exit(1)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="folder for everything it writes")] = Path(
        "runs/convert"
    ),
    iterations: Annotated[int, typer.Option(min=3, help="of continual pre-training")] = 8,
) -> None:
    """A released model to Megatron, a little training in infir2, back, to FP8, and its text."""
    from megatron_fp8_ext.demo import convert

    convert.main(output, iterations)


def _bytes(gigabytes: float) -> int:
    return int(gigabytes * 1e9)


@contextlib.contextmanager
def _model_folder(source: Path, out: Path) -> Iterator[Path]:
    """Yield a Hugging Face folder: the source, or what a GGUF file holds, for the time of the block."""
    if source.suffix != ".gguf":
        yield source
        return
    import tempfile

    from megatron_fp8_ext.checkpoint import gguf

    where = out.absolute().parent if out.absolute().parent.is_dir() else None
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=where) as folder:
        gguf.gguf_to_hf(source, Path(folder) / "model")
        yield Path(folder) / "model"


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Progress]:
    """Yield a function that starts a progress bar of bytes."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=Console(stderr=True))

    def start(total: int) -> Any:
        bar.start()  # not before: an error on the way there is a line of its own
        task = bar.add_task("", total=total)
        return lambda nbytes: bar.advance(task, nbytes)

    try:
        yield start
    finally:
        if bar.tasks:
            bar.stop()


def _print(report: Report) -> None:
    for note in report.notes:
        print(note)
    print(
        f"{report.path}: {report.tensors} tensors, {report.nbytes / 1e9:.2f} GB read in "
        f"{report.seconds:.1f} s, {report.gigabytes_per_second:.2f} GB/s"
    )
