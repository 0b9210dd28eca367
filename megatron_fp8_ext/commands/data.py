"""`megatron-fp8 data ...`: prepare training data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_fp8_ext.errors import UserError, unknown_name

if TYPE_CHECKING:
    from megatron_fp8_ext.sft.statistics import Statistics

app = typer.Typer(help="Prepare training data.", no_args_is_help=True)
_out = Console()
_COLUMNS = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
_TOO_LONG, _INVALID = ("drop", "truncate", "fail"), ("fail", "drop")


@app.command()
def tokenize(
    inputs: Annotated[
        list[Path], typer.Argument(help="JSONL or parquet files, one document a line or row")
    ],
    tokenizer: Annotated[str, typer.Option(help="folder with tokenizer.json, or a .gguf file")],
    output: Annotated[Path, typer.Option(help="prefix of the .bin and .idx files")],
    key: Annotated[str, typer.Option(help="field that holds the text")] = "text",
) -> None:
    """Write the .bin and .idx files that Megatron's --data-path reads."""
    _tokenize(inputs, tokenizer, output, key)


def _tokenize(inputs: list[Path], tokenizer: str, output: Path, key: str) -> None:
    from megatron_fp8_ext.megatron_plugin import corpus

    total = sum(path.stat().st_size for path in inputs if path.is_file())
    with Progress(*_COLUMNS, console=Console(stderr=True)) as bar:
        task = bar.add_task("tokenizing", total=total)
        documents = (text for path in inputs for text in corpus.documents_in(path, key))
        written = corpus.write_indexed(
            documents, tokenizer, output, lambda size: bar.advance(task, size)
        )
    print(f"{output}.bin, {output}.idx: {written.documents} documents, {written.tokens} tokens")


@app.command()
def pack(
    inputs: Annotated[list[Path], typer.Argument(help="JSONL or parquet files of chat samples")],
    tokenizer: Annotated[str, typer.Option(help="folder with tokenizer.json, or a .gguf file")],
    output: Annotated[Path, typer.Option(help="new directory for the shards")],
    seq_length: Annotated[int, typer.Option(help="tokens of the longest sample")] = 32768,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file, instead of the tokenizer's own template")
    ] = None,
    too_long: Annotated[str, typer.Option(help="longer samples: drop, truncate or fail")] = "drop",
    invalid: Annotated[
        str, typer.Option(help="records that cannot be used: fail or drop")
    ] = "fail",
    split_tool_turns: Annotated[
        bool, typer.Option(help="a turn for each tool result in a row, as slime renders them")
    ] = False,
    workers: Annotated[int, typer.Option(help="processes (0: one for each core)")] = 0,
    text: Annotated[
        bool, typer.Option(help="plain text for pre-training: write OUTPUT.bin and OUTPUT.idx")
    ] = False,
    key: Annotated[str, typer.Option(help="field that holds the text (--text)")] = "text",
) -> None:
    """Tokenize chat samples with their loss masks into shards for --sft-data."""
    if text:
        _tokenize(inputs, tokenizer, output, key)
        return
    for flag, value, known in (
        ("--too-long", too_long, _TOO_LONG),
        ("--invalid", invalid, _INVALID),
    ):
        if value not in known:
            raise unknown_name(flag, value, known)
    if seq_length < 2:
        raise UserError(f"--seq-length {seq_length}: a sample needs at least 2 tokens")
    try:
        from megatron_fp8_ext.sft import pack_job, shards, statistics, template
    except ImportError as error:
        raise UserError(
            f'packing needs the package {error.name}: pip install "megatron-fp8-ext[data]"'
        ) from error
    chat = template.load(tokenizer, chat_template, split_tool_turns)
    options = pack_job.Options(
        seq_length=seq_length,
        too_long=too_long,  # type: ignore[arg-type]  # checked above
        invalid=invalid,  # type: ignore[arg-type]
    )
    with Progress(*_COLUMNS, console=Console(stderr=True)) as bar:
        task = bar.add_task("packing", total=None)
        pack_job.pack(
            inputs,
            chat,
            output,
            options,
            workers or len(os.sched_getaffinity(0)),
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    data = shards.SampleShards(output)
    found = statistics.measure(data)
    drawn = statistics.save(output, found, data.lengths)
    _print(found, output)
    if not drawn:
        print(f'{statistics.PICTURE} needs matplotlib: pip install "megatron-fp8-ext[report]"')


def _print(found: Statistics, output: Path) -> None:
    from megatron_fp8_ext.sft import pack_job

    table = Table(box=None, show_header=False)
    table.add_row("samples", f"{found.samples:,}")
    table.add_row("tokens", f"{found.tokens:,}")
    table.add_row("in the loss", f"{found.supervised:,} ({found.supervised / found.tokens:.1%})")
    table.add_row(
        "lengths", f"median {found.median:,.0f}, mean {found.mean:,.0f}, longest {found.longest:,}"
    )
    batch, ranks = found.batch
    table.add_row(
        "fill",
        f"{found.batch_fill:.3f} packed by global batch ({batch} samples, {ranks} ranks), "
        f"{found.epoch_fill:.3f} packed by epoch",
    )
    table.add_row(
        "padding to 128", f"{found.batch_padding:.2%} by batch, {found.epoch_padding:.2%} by epoch"
    )
    table.add_row("truncated", f"{found.truncated:,}")
    for reason, count in sorted(found.dropped.items(), key=lambda item: -item[1])[:20]:
        table.add_row("dropped", f"{count:,}: {reason}")
    _out.print(table)
    lengths = Table("tokens", "samples", "", box=None)
    most = max(count for _, _, count in found.histogram)
    for start, end, count in found.histogram:
        bar = "█" * round(40 * count / most)
        lengths.add_row(f"{start:,} to {end:,}", f"{count:,}", bar)
    _out.print(lengths)
    if found.dropped or found.truncated:
        print(f"{output / pack_job.DROPPED}: file, line and reason of each")
    print(f"{output}: train with --sft-data {output} --loss infialign")


@app.command()
def bench(
    samples: Annotated[int, typer.Option(help="lengths packed for the throughput")] = 1_000_000,
    steps: Annotated[int, typer.Option(help="simulated global batches of each row")] = 500,
    tokenizer: Annotated[
        str | None, typer.Option(help="also measure tokenization with this tokenizer, on one core")
    ] = None,
) -> None:
    """Packer throughput; fill and balance beside first fit at InfiR2's settings."""
    import time

    from megatron_fp8_ext.packing import balance, bins, simulate

    lengths = simulate.lognormal_lengths(samples, seed=0)
    start = time.perf_counter()
    packs = bins.best_fit_decreasing(lengths, simulate.CAPACITY)
    seconds = time.perf_counter() - start
    fill = lengths.sum() / (len(packs) * simulate.CAPACITY)
    print(
        f"best-fit decreasing, one core: {samples:,} lengths in {seconds:.2f} s = "
        f"{samples / seconds / 1e6:.1f} M/s; {len(packs):,} packs, fill {fill:.4f}"
    )
    if tokenizer is not None:
        from megatron_fp8_ext.sft import tokenizing_speed

        print(tokenizing_speed.measure(tokenizer))
    table = Table("model", "batch", "ranks", "packer", "fill", "tokens", "cost", "micro-batches")
    for model, batch, ranks, layer in (
        ("Qwen2.5-7B", 64, 4, (3584, 18944, 3584, 512)),
        ("Qwen2.5-1.5B", 64, 8, (1536, 8960, 1536, 256)),
        ("Qwen2.5-1.5B", 256, 8, (1536, 8960, 1536, 256)),
    ):
        cost = balance.Cost(balance.attention_length(*layer, gated=True))
        drawn = simulate.lognormal_lengths(batch * min(steps, 20_000 // batch), seed=1)
        rows = simulate.simulate(drawn, batch, ranks, simulate.CAPACITY, cost)
        for name, row in zip(("strided, first fit", "ours"), rows, strict=True):
            shown = (f"{value:.3f}" for value in (row.fill, row.tokens, row.cost))
            table.add_row(model, str(batch), str(ranks), name, *shown, f"{row.microbatches:.2f}")
    _out.print(table)
    print("fill: tokens / slots; tokens and cost: mean rank / slowest rank, cost counts attention")
