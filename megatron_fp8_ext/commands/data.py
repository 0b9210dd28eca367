"""`megatron-fp8 data ...`: prepare training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(help="Prepare training data.", no_args_is_help=True)


@app.command()
def tokenize(
    inputs: Annotated[list[Path], typer.Argument(help="JSONL files, one document a line")],
    tokenizer: Annotated[str, typer.Option(help="folder with tokenizer.json, or a .gguf file")],
    output: Annotated[Path, typer.Option(help="prefix of the .bin and .idx files")],
    key: Annotated[str, typer.Option(help="field that holds the text")] = "text",
) -> None:
    """Write the .bin and .idx files that Megatron's --data-path reads."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from megatron_fp8_ext.megatron_plugin import corpus

    total = sum(path.stat().st_size for path in inputs if path.is_file())
    columns = (TextColumn("tokenizing"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        documents = (text for path in inputs for text in corpus.documents_in(path, key))
        written = corpus.write_indexed(
            documents, tokenizer, output, lambda size: bar.advance(task, size)
        )
    print(f"{output}.bin, {output}.idx: {written.documents} documents, {written.tokens} tokens")
