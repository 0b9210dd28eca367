"""Ready-made comparisons for `megatron-fp8 compare NAME`, out of installed packages alone.

Text is CPython's documentation and library in tokens of SmolLM2's tokenizer, or generated sums; the
released model is SmolLM2-135M-Instruct. Flags after the name are added to the command, so that the same
comparison can be tried in small on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from megatron_fp8_ext.demo import run, two_stages
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import arguments

# Qwen2.5-0.5B's layers (24 x 896, 14 heads of 64, 2 groups) over SmolLM2's vocabulary, for which there is a
# tokenizer without a download: 0.40 billion parameters.
QWEN = (
    "--num-layers 24 --hidden-size 896 --ffn-hidden-size 4864 --num-attention-heads 14 "
    "--group-query-attention --num-query-groups 2 --add-qkv-bias --disable-bias-linear --swiglu "
    "--normalization RMSNorm --norm-epsilon 1e-6 --position-embedding-type rope --rotary-base 1000000 "
    "--attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02 --vocab-size 49152"
).split()
PRETRAINING = (
    "--seq-length 1024 --max-position-embeddings 8192 --bf16 --use-distributed-optimizer "
    "--micro-batch-size 8 --global-batch-size 8 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 "
    "--lr-decay-style WSD --lr-wsd-decay-style cosine --split 100,0,0 --eval-iters 0 "
    "--eval-interval 1000000 --log-interval 1 --seed 1236 --no-gradient-accumulation-fusion "
    "--tokenizer-type NullTokenizer"
).split()
SFT_BATCH, SFT_RATE = 32, 2e-4


@dataclass(frozen=True)
class Prepared:
    """What `compare` runs.

    Attributes:
        command: training command of all members.
        score: command that scores a finished one; None without.
    """

    command: tuple[str, ...]
    score: str | None = None


@dataclass(frozen=True)
class Proof:
    """A ready-made comparison.

    Attributes:
        summary: one line.
        steps: iterations where none are asked for.
        prepare: (folder for data and start, iterations, flags to add, console) -> what to run.
    """

    summary: str
    steps: int
    prepare: Callable[[Path, int, Sequence[str], Console], Prepared]


def _small(folder: Path, steps: int, extra: Sequence[str], console: Console) -> Prepared:
    return Prepared((*run.command(run.corpus(folder / "corpus" / "text", console), steps), *extra))


def _smollm2(folder: Path, steps: int, extra: Sequence[str], console: Console) -> Prepared:
    from megatron_fp8_ext.checkpoint import megatron

    data = run.corpus(folder / "corpus" / "text", console)
    weights = two_stages.released_weights(folder / "released", folder / "weights", console)
    architecture = (weights / megatron.FLAGS_FILE).read_text().split()
    return _pretraining(
        [*architecture, "--load", str(weights), "--finetune"], 5e-5, data, steps, extra,
        warmup=steps // 20,
    )  # fmt: skip


def _qwen(folder: Path, steps: int, extra: Sequence[str], console: Console) -> Prepared:
    # A higher rate, or one reached sooner, throws BF16 itself from side to side: 5 % from seed to seed.
    data = run.corpus(folder / "corpus" / "text", console)
    return _pretraining(QWEN, 2e-4, data, steps, extra, warmup=steps // 4)


def _pretraining(
    model: Sequence[str],
    rate: float,
    data: Path,
    steps: int,
    extra: Sequence[str],
    warmup: int,
) -> Prepared:
    schedule = (
        f"--lr {rate} --min-lr {rate / 100} --lr-warmup-iters {max(warmup, 1)} "
        f"--lr-wsd-decay-iters {max(steps // 5, 1)}"
    ).split()
    where = ["--data-path", str(data), "--data-cache-path", str(data.parent / "cache")]
    start = [sys.executable, "-m", run.ENTRY]
    return Prepared((*start, *model, *PRETRAINING, *schedule, *where, *extra))


def _sft(folder: Path, steps: int, extra: Sequence[str], console: Console) -> Prepared:
    """One epoch of short and long sums; the score is the share of held-out ones answered rightly."""
    from megatron_fp8_ext.sft import pack_job, template

    released = folder / "released"
    weights = two_stages.released_weights(released, folder / "weights", console)
    batch = int(arguments.value(extra, "--global-batch-size") or SFT_BATCH)
    scale = replace(two_stages.known_scale(), samples=-(-steps * batch // 2), batch=batch, epochs=1)
    short, long, tests = two_stages.problems(folder, scale)
    packed = folder / f"packed-{scale.samples}"
    with console.status("packing with SmolLM2's tokenizer and chat template"):
        options = pack_job.Options(seq_length=two_stages.SEQ_LENGTH)
        pack_job.pack([short, long], template.load(released), packed, options)
    stage = two_stages.Stage(1, (short, long), SFT_RATE, str(weights))
    command = two_stages.command(weights, packed, stage, batch, steps)
    score = two_stages.score_command(released, tests, scale)
    # One checkpoint: the score reads it, and several would fill a disk.
    return Prepared((*command, "--save-interval", str(steps), *extra), score)


PROOFS = {
    "demo": Proof("a small GPT from scratch, minutes on a CPU", 240, _small),
    "smollm2-cpt": Proof("continual pre-training of SmolLM2-135M-Instruct", 400, _smollm2),
    "qwen2.5-0.4b": Proof(
        "a Qwen2.5-0.5B shape with a smaller vocabulary, from scratch", 400, _qwen
    ),
    "smollm2-sft": Proof("packed SFT of SmolLM2-135M-Instruct, with exact match", 300, _sft),
}


def prepare(
    words: Sequence[str], folder: Path, steps: int | None, console: Console
) -> tuple[Prepared, int]:
    """Make what a comparison starts from, once, and return it with its length.

    Args:
        words: NAME, and flags to add to its command.
        folder: where data and starting weights go; a later call finds them there.
        steps: iterations of each run; None for the comparison's own.
        console: for progress.

    Raises:
        UserError: a word after the name that is no flag, too few steps, or a package is missing.
    """
    name, *extra = words
    if extra and not extra[0].startswith("--"):
        raise UserError(f"{name} takes Megatron flags after it, not '{extra[0]}'")
    proof = PROOFS[name]
    steps = proof.steps if steps is None else steps
    if steps < 2:
        raise UserError(f"--steps {steps}: {name} needs at least 2")
    folder.mkdir(parents=True, exist_ok=True)
    return proof.prepare(folder, steps, extra, console), steps
