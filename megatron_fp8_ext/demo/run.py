"""The demo's steps: corpus, two training runs through Megatron's own loop, table, page."""

from __future__ import annotations

import contextlib
import io
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_fp8_ext import training_log
from megatron_fp8_ext.demo import text
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.training_log import Iteration

RECIPES = ("bf16", "infir2")
ENTRY = "megatron_fp8_ext.megatron_plugin.pretrain_gpt"

# Qwen2.5's architecture (grouped-query attention, QKV bias, SwiGLU, RMSNorm, tied embeddings) at a
# size that two CPU cores train in minutes, with SmolLM2's real vocabulary.
MODEL = (
    "--num-layers 4 --hidden-size 256 --ffn-hidden-size 768 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2 --add-qkv-bias --disable-bias-linear --swiglu "
    "--normalization RMSNorm --norm-epsilon 1e-6 --position-embedding-type rope --rotary-base 1000000 "
    "--seq-length 256 --max-position-embeddings 256 --attention-dropout 0 --hidden-dropout 0 "
    "--init-method-std 0.02 --tokenizer-type NullTokenizer --vocab-size 49152"
).split()
TRAINING = (
    "--bf16 --use-distributed-optimizer --micro-batch-size 4 --global-batch-size 4 --lr 1e-3 "
    "--min-lr 1e-5 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --split 98,2,0 "
    "--eval-iters 0 --eval-interval 1000000 --log-interval 1 --seed 1236 "
    "--no-gradient-accumulation-fusion"
).split()


@dataclass(frozen=True)
class Result:
    """One finished run."""

    recipe: str
    iterations: list[Iteration]
    seconds: float
    checkpoint: Path
    log: Path

    @property
    def final_loss(self) -> float:
        """Mean loss of the last tenth of the iterations."""
        losses = [i.loss for i in self.iterations if i.loss is not None]
        return statistics.fmean(losses[-max(len(losses) // 10, 1) :])

    @property
    def milliseconds(self) -> float:
        """Median time of an iteration after the first three."""
        return statistics.median(i.milliseconds for i in self.iterations[3:])


def command(recipe: str, data: Path, save: Path, iterations: int) -> list[str]:
    """Return the training command of one run: what a user types, with our one flag at its end."""
    schedule = (
        f"--train-iters {iterations} --lr-decay-style WSD --lr-wsd-decay-style cosine "
        f"--lr-warmup-iters {max(iterations // 10, 1)} --lr-wsd-decay-iters {iterations // 4} "
        f"--save-interval {iterations}"
    ).split()
    where = ["--data-path", str(data), "--data-cache-path", str(data.parent / "cache")]
    return [
        sys.executable, "-m", ENTRY, *MODEL, *TRAINING, *schedule, *where,
        "--save", str(save), "--fp8-recipe", recipe,
    ]  # fmt: skip


def main(output: Path, iterations: int) -> None:
    """Run the demo; everything it writes is under `output`.

    Raises:
        UserError: too few iterations, a missing package, or a failed run (its log is named).
    """
    if iterations < 20:
        raise UserError(f"--iterations {iterations}: the curves need at least 20")
    from megatron_fp8_ext.demo import page  # before training: a missing package should cost nothing

    console = Console()
    data = corpus(output / "corpus" / "text", console)
    results = [_train(recipe, data, output, iterations, console) for recipe in RECIPES]
    _table(results, console)
    written = page.write(output / "report.html", results)
    console.print(f"page: {written}", soft_wrap=True)


def corpus(prefix: Path, console: Console) -> Path:
    """Tokenize the demo's text, unless an earlier demo did, and return its `--data-path`."""
    if prefix.with_suffix(".idx").is_file():
        console.print(f"corpus: {prefix} (from an earlier run)", soft_wrap=True)
        return prefix
    from megatron_fp8_ext.megatron_plugin import corpus as writer

    tokenizer = text.tokenizer_file()
    with console.status("tokenizing CPython's documentation and library with SmolLM2's tokenizer"):
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # Megatron warns of what it does not find on a CPU
            written = writer.write_indexed(text.documents(), str(tokenizer), prefix)
    console.print(
        f"corpus: {prefix}, {written.documents} documents, {written.tokens:,} tokens",
        soft_wrap=True,
    )
    return prefix


def _train(recipe: str, data: Path, output: Path, iterations: int, console: Console) -> Result:
    save, log = output / recipe, output / f"{recipe}.log"
    shutil.rmtree(save, ignore_errors=True)  # an earlier demo's; it starts from scratch
    start = time.monotonic()
    found = follow(recipe, command(recipe, data, save, iterations), log, (0, iterations), console)
    checkpoint = save / f"iter_{iterations:07d}"
    return Result(recipe, found, time.monotonic() - start, checkpoint, log)


def follow(
    name: str, argv: Sequence[str], log: Path, span: tuple[int, int], console: Console
) -> list[Iteration]:
    """Run a training command, show its progress, and return its iterations.

    Args:
        name: what the progress bar calls it.
        argv: the command.
        log: where its output goes.
        span: iteration it continues from, and its last one.
        console: where the bar is drawn.

    Raises:
        UserError: it stopped early; its last words and its log are named.
    """
    found: list[Iteration] = []
    columns = (
        TextColumn("{task.description:>6}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[note]}"),
        TimeRemainingColumn(),
    )
    first, last = span
    with Progress(*columns, console=console) as bar, log.open("w") as file:
        task = bar.add_task(name, total=last - first, note="starting")
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        file.write(f"$ {' '.join(argv)}\n")
        for line in process.stdout:
            file.write(line)
            if line.startswith("megatron_fp8_ext: no GPU"):
                bar.console.print(line.strip(), soft_wrap=True)
            iteration = training_log.parse_line(line)
            if iteration is not None:
                found.append(iteration)
                shown = "skipped" if iteration.loss is None else f"loss {iteration.loss:.3f}"
                bar.update(task, completed=iteration.number - first, note=shown)
        code = process.wait()
    if code != 0 or len(found) != last - first:
        raise UserError(
            f"the {name} run stopped with exit code {code} after {len(found)} of {last - first} "
            f"iterations: {_last_words(log)}; the whole log is {log}"
        )
    return found


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error:" in line]
    return (errors or lines or ["no output"])[-1]


def _table(results: Sequence[Result], console: Console) -> None:
    table = Table(
        "recipe", "first loss", "final loss", "gap to BF16", "ms/iteration", "time", box=None
    )
    base = results[0].final_loss
    for result in results:
        gap = (result.final_loss - base) / base
        table.add_row(
            result.recipe,
            f"{result.iterations[0].loss:.4f}",
            f"{result.final_loss:.4f}",
            "" if result is results[0] else f"{gap:+.2%}",
            f"{result.milliseconds:.0f}",
            f"{result.seconds:.0f} s",
        )
    console.print(table)
    for result in results:
        console.print(
            f"{result.recipe}: checkpoint {result.checkpoint}, log {result.log}", soft_wrap=True
        )
