"""`megatron-fp8 demo sft --pretrained`: two SFT stages of SmolLM2-135M-Instruct, BF16 and infir2.

The recipe of InfiR2 in small: both precisions start from the same released weights; stage 1 learns short
sums, stage 2 goes on from each one's stage 1 with longer ones added. Held-out sums are answered before
and after. Every run is a member of a comparison (`megatron-fp8 compare`), so an interrupted demo goes on.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_fp8_ext.demo import answers, reasoning, text
from megatron_fp8_ext.demo.follow import quiet
from megatron_fp8_ext.demo.run import ENTRY, RECIPES
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.files import write_atomically
from megatron_fp8_ext.proof import figures, page, plan, report, run
from megatron_fp8_ext.proof.result import Result

SEQ_LENGTH = 4096  # of a pack; the longest sample has about 900
TRAINING = (
    f"--seq-length {SEQ_LENGTH} --bf16 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable "
    "--lr-decay-style cosine --lr-warmup-fraction 0.05 --adam-beta2 0.95 --weight-decay 0 "
    "--clip-grad 1.0 --log-interval 1 --seed 1236 --tokenizer-type NullTokenizer "
    "--no-gradient-accumulation-fusion --loss infialign"
).split()


@dataclass(frozen=True)
class Scale:
    """How much one machine can do in minutes.

    Attributes:
        samples: of stage 1; stage 2 reads them again, with as many long ones.
        batch: samples of a global batch.
        epochs: of each stage.
        held_out: problems of each kind that are answered.
        answer: tokens of the longest answer.
    """

    samples: int
    batch: int
    epochs: int
    held_out: int
    answer: int


CPU = Scale(samples=32, batch=4, epochs=1, held_out=4, answer=160)
# The longest right answer to one of these problems has 741 tokens; one that never stops holds up its batch.
GPU = Scale(samples=8192, batch=64, epochs=1, held_out=128, answer=768)


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        number: from 1.
        files: its samples.
        rate: learning rate at the start; its end is a tenth.
        load: checkpoint; `{run}` is the name of a run.
    """

    number: int
    files: tuple[Path, ...]
    rate: float
    load: str


def main(
    output: Path, samples: int | None, epochs: int | None, parallel: int | None = None
) -> None:
    """Run both stages in both precisions; everything is under `output`.

    Args:
        output: folder.
        samples: of stage 1; None for what the machine can do in minutes.
        epochs: of each stage; None likewise.
        parallel: runs at a time; None for one on each GPU.

    Raises:
        UserError: a missing package, too few samples, or a failed run (its log is named).
    """
    page.require()
    scale = _scale(samples, epochs)
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    released = output / "released"
    weights = released_weights(released, output / "weights", console)
    short, long, tests = problems(output, scale)
    score = score_command(released, tests, scale)
    before = _before(
        output / f"before-{scale.held_out}-{scale.answer}.json", released, tests, scale, console
    )
    stages = (
        Stage(1, (short,), 2e-4, str(weights)),
        Stage(2, (short, long), 1e-4, str(output / "stage1" / plan.RUN / "weights")),
    )
    found = []
    for stage in stages:
        found.append(_train(stage, output, scale, score, console, parallel))
        if stage.number < len(stages):
            _next_start(found[-1], released, console)
    console.print(_write(output, found, before))
    console.print(
        f"{output}: summary.md, losses.csv, loss-stage1.svg, loss-stage2.svg, and the report of each stage",
        soft_wrap=True,
    )


def _before(
    file: Path, released: Path, tests: Sequence[Path], scale: Scale, console: Console
) -> dict[str, float]:
    """Scores before training, out of `file` where an interrupted demo left them."""
    if not file.is_file():
        with console.status("answering held-out sums before training"):
            found = answers.score(released, released, tests, scale.answer)
        write_atomically(file, json.dumps(found) + "\n")
    before: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    return before


def known_scale() -> Scale:
    """What this machine can do in minutes."""
    import torch

    return GPU if torch.cuda.is_available() else CPU


def score_command(released: Path, tests: Sequence[Path], scale: Scale) -> str:
    """Return the command for `--score`: the share of right answers to each file of problems."""
    return shlex.join(
        [sys.executable, "-m", "megatron_fp8_ext.demo.answers", "{checkpoints}", *map(str, tests),
         "--hf-reference", str(released), "--max-tokens", str(scale.answer)]
    )  # fmt: skip


def _scale(samples: int | None, epochs: int | None) -> Scale:
    known = known_scale()
    scale = Scale(
        samples or known.samples, known.batch, epochs or known.epochs, known.held_out, known.answer
    )
    if scale.samples * scale.epochs < 5 * scale.batch:
        raise UserError(f"--samples {samples}: the demo needs at least {5 * scale.batch}")
    return scale


def released_weights(released: Path, weights: Path, console: Console) -> Path:
    """SmolLM2-135M-Instruct from its GGUF file, as a model folder and as a Megatron checkpoint."""
    from megatron_fp8_ext.checkpoint import gguf, megatron

    if not released.is_dir():
        with quiet(console, "SmolLM2-135M-Instruct: from GGUF to a Hugging Face folder"):
            gguf.gguf_to_hf(text.tokenizer_file(), released)
    if not weights.is_dir():
        with quiet(console, "and to Megatron"):
            megatron.hf_to_megatron(released, weights)
    console.print(f"released weights: {weights}", soft_wrap=True)
    return weights


def problems(output: Path, scale: Scale) -> tuple[Path, Path, tuple[Path, Path]]:
    """Write both sets of samples and, for each, problems that neither holds."""
    short, long = (output / f"{name}-{scale.samples}.jsonl" for name in ("short", "long"))
    for file, seed, longest in ((short, 1236, 2), (long, 1237, 8)):
        if not file.is_file():
            reasoning.write(file, scale.samples, seed, longest)
    taken = {
        reasoning.question(sample) for file in (short, long) for sample in reasoning.read(file)
    }
    tests = (output / "short sums.jsonl", output / "long sums.jsonl")
    for file, seed, longest in zip(tests, (1, 2), (2, 8), strict=True):
        reasoning.write(file, scale.held_out, seed, longest, without=taken)
    return short, long, tests


def _train(
    stage: Stage, output: Path, scale: Scale, score: str, console: Console, parallel: int | None
) -> Result:
    from megatron_fp8_ext.sft import pack_job, shards, statistics, template

    name = f"stage{stage.number}"
    packed = output / f"packed-{name}-{scale.samples}"
    with console.status(f"{name}: packing with SmolLM2's tokenizer and chat template"):
        chat = template.load(output / "released")
        options = pack_job.Options(seq_length=SEQ_LENGTH)
        pack_job.pack(list(stage.files), chat, packed, options)
    data = shards.SampleShards(packed)
    shown = statistics.measure(data, batch=scale.batch, ranks=1)
    console.print(
        f"{name}: {shown.samples:,} samples, {shown.tokens:,} tokens ({shown.supervised:,} in the "
        f"loss), longest {shown.longest:,}, fill {shown.batch_fill:.2f} by batch"
    )
    steps = shown.samples * scale.epochs // scale.batch
    argv = command(output / "weights", packed, stage, scale.batch, steps)
    members = plan.plan(argv, RECIPES, 1, steps, output / name, stats_interval=max(steps // 4, 1))
    run.execute(members, console, parallel, score)
    found = report.write([output / name], output / name, console)
    for each in found.runs:
        if not each.run.ended_well:
            raise UserError(
                f"{name}: the {each.run.recipe} run stopped after {max(each.run.iterations, default=0)} "
                f"of {steps} iterations: {each.run.why}; its log is {each.run.folder / 'log.txt'}"
            )
    return found


def command(weights: Path, packed: Path, stage: Stage, batch: int, steps: int) -> list[str]:
    """Return a stage's training command: what a user types, without the one flag that is ours."""
    from megatron_fp8_ext.checkpoint import megatron

    architecture = (weights / megatron.FLAGS_FILE).read_text().split()
    return [
        sys.executable, "-m", ENTRY, *architecture, *TRAINING, "--lr", str(stage.rate),
        "--min-lr", str(stage.rate / 10), "--global-batch-size", str(batch), "--train-iters", str(steps),
        "--sft-data", str(packed), "--load", stage.load, "--finetune", "--save", "checkpoints",
        "--save-interval", str(max(steps // 2, 1)),
    ]  # fmt: skip


def _next_start(found: Result, released: Path, console: Console) -> None:
    """What each run left, as the next stage's weights: its FP32 main parameters, rounded to BF16.

    With `--load` of the checkpoint itself, FP8 weights would come back dequantized.
    """
    from megatron_fp8_ext.checkpoint import megatron

    for each in found.runs:
        folder = each.run.folder
        with quiet(console, f"{folder.name}: weights for the next stage"):
            if not (folder / "hf").is_dir():
                megatron.megatron_to_hf(folder / "checkpoints", folder / "hf", released)
            if not (folder / "weights").is_dir():
                megatron.hf_to_megatron(folder / "hf", folder / "weights")


def _write(output: Path, found: Sequence[Result], before: dict[str, float]) -> Table:
    """Write `losses.csv` (one row a step), a picture of each stage and `summary.md`; return its table."""
    rows = io.StringIO()
    losses = csv.writer(rows, lineterminator="\n")
    losses.writerow(["stage", "step", *RECIPES])
    for number, result in enumerate(found, 1):
        columns = {each.run.recipe: each.run.losses for each in result.runs}
        for step in range(1, result.steps + 1):
            cells = (columns[recipe].get(step) for recipe in RECIPES)
            losses.writerow([number, step, *("" if c is None else f"{c:.6f}" for c in cells)])
        for picture in figures.draw(result):
            if picture.title == "Loss":
                write_atomically(output / f"loss-stage{number}.svg", picture.svg)
    write_atomically(output / "losses.csv", rows.getvalue())
    head = ("stage", "recipe", "steps", "first loss", "final loss", *before)
    body = [("released", "", "", "", "", *(f"{value:.1%}" for value in before.values()))]
    for number, result in enumerate(found, 1):
        for each in result.runs:
            scores = (f"{each.run.scores[name]:.1%}" for name in before)
            first, final = f"{each.run.losses[1]:.4f}", f"{each.final_loss:.4f}"
            row = (str(number), each.run.recipe, str(result.steps), first, final, *scores)
            body.append(row)
    versions = ", ".join(f"{name} {value}" for name, value in sorted(found[0].versions.items()))
    lines = ["# Two SFT stages of SmolLM2-135M-Instruct, BF16 and infir2", "", f"{versions}.", ""]
    lines += [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
    lines += ["", "Final loss: mean of the last fifth of the steps.", ""]
    for number, result in enumerate(found, 1):
        for each in result.runs:
            argv = shlex.join(["python", *each.run.described["argv"][1:]])
            lines.append(f"Stage {number}, {each.run.recipe}:\n\n```\n{argv}\n```\n")
    write_atomically(output / "summary.md", "\n".join(lines))
    table = Table(*head, box=None)
    for row in body:
        table.add_row(*row)
    return table
