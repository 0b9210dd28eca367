"""The demo: a corpus and a command for `proof`, which trains in both precisions and makes the page."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.console import Console

from megatron_fp8_ext.demo import text
from megatron_fp8_ext.demo.follow import quiet
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.proof import page, plan, report, run

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


def command(data: Path, iterations: int) -> list[str]:
    """Return the training command: what a user types, without the one flag that is ours."""
    schedule = (
        f"--train-iters {iterations} --lr-decay-style WSD --lr-wsd-decay-style cosine "
        f"--lr-warmup-iters {max(iterations // 10, 1)} --lr-wsd-decay-iters {iterations // 4} "
        f"--save-interval {iterations} --save checkpoints"
    ).split()
    where = ["--data-path", str(data), "--data-cache-path", str(data.parent / "cache")]
    return [sys.executable, "-m", ENTRY, *MODEL, *TRAINING, *schedule, *where]


def main(output: Path, iterations: int) -> None:
    """Run the demo; everything it writes is under `output`.

    Raises:
        UserError: too few iterations, a missing package, or a failed run (its log is named).
    """
    if iterations < 20:
        raise UserError(f"--iterations {iterations}: the curves need at least 20")
    page.require()  # before training: a missing package should cost nothing
    console = Console()
    argv = command(corpus(output / "corpus" / "text", console), iterations)
    members = plan.plan(argv, RECIPES, 1, iterations, output)
    for member in members:
        shutil.rmtree(
            member.folder, ignore_errors=True
        )  # an earlier demo's; it starts from scratch
    run.execute(members, console)
    found = report.write([output], output, console)
    for each in found.runs:
        if each.run.status != "finished":
            raise UserError(
                f"the {each.run.recipe} run stopped after {max(each.run.iterations, default=0)} of "
                f"{iterations} iterations: {each.run.why}; its log is {each.run.folder / 'log.txt'}"
            )
        place = each.run.folder / "checkpoints" / f"iter_{iterations:07d}"
        console.print(f"{each.run.recipe}: checkpoint {place}", soft_wrap=True)


def corpus(prefix: Path, console: Console) -> Path:
    """Write the corpus once and return its prefix."""
    if prefix.with_suffix(".idx").is_file():
        console.print(f"corpus: {prefix} (from an earlier run)", soft_wrap=True)
        return prefix
    from megatron_fp8_ext.megatron_plugin.corpus import write_indexed

    tokenizer = text.tokenizer_file()
    with quiet(console, "tokenizing CPython's documentation and library with SmolLM2's tokenizer"):
        written = write_indexed(text.documents(), str(tokenizer), prefix)
    console.print(
        f"corpus: {prefix}, {written.documents} documents, {written.tokens:,} tokens",
        soft_wrap=True,
    )
    return prefix
