"""`megatron-fp8 demo sft`: packed SFT of a small GPT on a verifiable reasoning set, BF16 and infir2."""

from __future__ import annotations

import statistics as numbers
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_fp8_ext import training_log
from megatron_fp8_ext.demo import reasoning, text
from megatron_fp8_ext.demo.run import ENTRY, MODEL, RECIPES
from megatron_fp8_ext.errors import UserError

SEQ_LENGTH, BATCH = 1024, 16
TRAINING = (
    f"--bf16 --use-distributed-optimizer --global-batch-size {BATCH} --lr 1e-3 --min-lr 1e-4 "
    "--lr-decay-style cosine --lr-warmup-fraction 0.05 --adam-beta2 0.95 --weight-decay 0 "
    "--clip-grad 1.0 --log-interval 1 --seed 1236 --no-gradient-accumulation-fusion"
).split()


def main(output: Path, samples: int, epochs: int) -> None:
    """Generate, pack and train; everything is under `output`.

    Raises:
        UserError: too few samples, a missing package, or a failed run (its log is named).
    """
    if samples < 10 * BATCH:
        raise UserError(f"--samples {samples}: the demo needs at least {10 * BATCH}")
    from megatron_fp8_ext.sft import pack_job, shards, statistics, template

    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    source = output / f"reasoning-{samples}.jsonl"
    if not source.is_file():
        reasoning.write(source, samples)
    packed = output / f"packed-{samples}"
    with console.status("packing with SmolLM2's tokenizer and chat template"):
        chat = template.load(text.tokenizer_file())
        pack_job.pack([source], chat, packed, pack_job.Options(seq_length=SEQ_LENGTH))
    data = shards.SampleShards(packed)
    found = statistics.measure(data, batch=BATCH, ranks=1)
    console.print(
        f"{found.samples:,} samples, {found.tokens:,} tokens ({found.supervised:,} in the loss), "
        f"fill {found.batch_fill:.2f} by batch"
    )
    table = Table("recipe", "steps", "first loss", "final loss", box=None)
    for recipe in RECIPES:
        losses = _train(recipe, packed, output, epochs, console)
        tail = numbers.fmean(losses[-max(len(losses) // 10, 1) :])
        table.add_row(recipe, str(len(losses)), f"{losses[0]:.4f}", f"{tail:.4f}")
    console.print(table)


def command(recipe: str, packed: Path, epochs: int) -> list[str]:
    """Return the training command: what a user types."""
    model = list(MODEL)
    for flag in ("--seq-length", "--max-position-embeddings"):
        model[model.index(flag) + 1] = str(SEQ_LENGTH)
    data = ["--sft-data", str(packed), "--loss", "infialign", "--sft-epochs", str(epochs)]
    return [sys.executable, "-m", ENTRY, *model, *TRAINING, *data, "--fp8-recipe", recipe]


def _train(recipe: str, packed: Path, output: Path, epochs: int, console: Console) -> list[float]:
    log = output / f"{recipe}.log"
    with console.status(f"training in {recipe}"), log.open("w") as file:
        argv = command(recipe, packed, epochs)
        file.write(f"$ {' '.join(argv)}\n")
        file.flush()
        code = subprocess.call(argv, stdout=file, stderr=subprocess.STDOUT)
    with log.open(encoding="utf-8", errors="replace") as file:
        losses = [each.loss for each in training_log.parse(file) if each.loss is not None]
    if code != 0 or not losses:
        raise UserError(f"the {recipe} run stopped with exit code {code}; its log is {log}")
    console.print(f"{recipe}: log {log}", soft_wrap=True)
    return losses
