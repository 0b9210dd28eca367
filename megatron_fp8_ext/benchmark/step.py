"""A training step of a whole model, one side of a comparison after the other, in Megatron's own loop.

Each side is a process (group) of its own, `megatron_plugin.step_timing`, so that neither memory nor patches
nor a warm cache of one reach the next. Every side sees the same random tokens and the same initial weights.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp8_ext.benchmark.sides import Side
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.picture import write_svg

PARTS = (
    "forward",
    "layers forward",
    "backward",
    "layers backward",
    "optimizer",
    "train step",
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What every side does.

    Attributes:
        model: its name, for the record.
        architecture: its flags, by Megatron's name without dashes; `true` is a switch.
        seq_length: tokens of a sequence.
        micro_batch_size: sequences of a micro-batch.
        micro_batches: micro-batches of a step (on each data-parallel rank; here there is one).
        tensor_parallel: GPUs, tensor-parallel with sequence parallelism.
        iterations: measured.
        warm_up: iterations before them.
        skip_optimizer: leave the optimizer's step out, and with it the memory of its moments.
        kernels: run one step more, and note each kernel's time in it.
    """

    model: str
    architecture: dict[str, str]
    seq_length: int
    micro_batch_size: int
    micro_batches: int = 1
    tensor_parallel: int = 1
    iterations: int = 10
    warm_up: int = 4
    skip_optimizer: bool = False
    kernels: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is int and value < (0 if name == "warm_up" else 1):
                raise UserError(f"bench step: --{name.replace('_', '-')} {value} is too small")


def command(step: Step, side: Side) -> list[str]:
    """Return the Megatron flags of one side."""
    argv: list[str] = []
    for name, value in step.architecture.items():
        if value == "true":
            argv.append(f"--{name}")
        elif value != "false":
            argv += [f"--{name}", value]
    if step.tensor_parallel > 1:
        argv += ["--tensor-model-parallel-size", str(step.tensor_parallel), "--sequence-parallel"]
    iterations = step.iterations + step.warm_up + int(step.kernels)
    return [
        *argv,
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", "256"),
        *("--seq-length", str(step.seq_length)),
        *("--max-position-embeddings", str(step.seq_length)),
        *("--micro-batch-size", str(step.micro_batch_size)),
        *("--global-batch-size", str(step.micro_batch_size * step.micro_batches)),
        *("--train-iters", str(iterations)),
        *("--attention-dropout", "0", "--hidden-dropout", "0", "--init-method-std", "0.008"),
        *("--lr", "1e-4", "--min-lr", "1e-5", "--lr-decay-style", "constant", "--seed", "1236"),
        *("--weight-decay", "0.1", "--adam-beta2", "0.95", "--clip-grad", "1.0"),
        *("--eval-iters", "0", "--eval-interval", "1000000", "--log-interval", "1"),
        *("--bf16", "--use-distributed-optimizer", "--no-gradient-accumulation-fusion"),
        *side.flags,
    ]


def measure(step: Step, side: Side, log: Path, timeout: float) -> dict[str, Any]:
    """Run one side and return its record; what it printed goes to the file `log`.

    Raises:
        UserError: it failed; the message has its last line.
    """
    argv = command(step, side)
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        out = Path(folder) / "record.json"
        module = ["-m", "megatron_fp8_ext.megatron_plugin.step_timing"]
        launcher = [sys.executable]
        if step.tensor_parallel > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc-per-node", str(step.tensor_parallel)]
        optimizer = "skip" if step.skip_optimizer else "step"
        profiled = str(step.warm_up + step.iterations + 1 if step.kernels else 0)
        whole = [*launcher, *module, str(out), str(step.warm_up), optimizer, profiled, *argv]
        own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        environ = {name: value for name, value in os.environ.items() if name not in own}
        environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        try:
            with log.open("w", encoding="utf-8") as file:
                done = subprocess.run(
                    whole, stdout=file, stderr=subprocess.STDOUT, env=environ, timeout=timeout
                )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"bench step: {side.name} did not end within {timeout:.0f} s; see {log}"
            ) from None
        if done.returncode or not out.is_file():
            raise UserError(f"bench step: {side.name} failed: {_last_line(log)} (all of it: {log})")
        record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return {"side": side.name, "loss": side.loss, "flags": argv, **record}


def _last_line(log: Path) -> str:
    lines = [
        line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line
    ]
    named = [line for line in lines if "rror" in line]
    return (named or lines or ["it printed nothing"])[-1][:200]


def spread(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile (nearest rank)."""
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return {
        "median": statistics.median(ordered),
        "low": ordered[tenth],
        "high": ordered[-1 - tenth],
    }


def summarize(record: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one side from what its process wrote.

    The keys of `times` are PARTS and "forward and backward"; milliseconds. `memory` is in bytes: the peak of
    forward and backward with the optimizer state, the same without it, and the peak of the whole step.
    """
    counted = [row for row in record["rows"] if row["counted"]]
    times = {part: spread([row[part] for row in counted]) for part in PARTS if part in counted[0]}
    both = [row["forward"] + row["backward"] for row in counted]
    times["forward and backward"] = spread(both)
    memory = record["memory"]
    peak, state = memory["forward and backward"], memory["optimizer state"]
    step_ms = times["train step"]["median"]
    return {
        "side": record["side"],
        "loss": record["loss"],
        "times": times,
        "memory": {
            "with state": peak,
            "without state": max(peak - state, 0) if peak else 0,
            "whole step": memory["step"],
        },
        "tflop_s": record["flop_step"] / record["world_size"] / step_ms / 1e9,
        "first_loss": next(iter(record["rows"][0]["loss"].values()), None),
        "last_loss": next(iter(record["rows"][-1]["loss"].values()), None),
        "attention": record["attention"],
    }


def markdown(step: Step, versions: dict[str, str], sides: list[dict[str, Any]]) -> str:
    """Return the comparison as a table; ratios are to the first side."""
    base = sides[0]
    tokens = step.seq_length * step.micro_batch_size * step.micro_batches
    lines = [
        f"{', '.join(f'{k} {v}' for k, v in versions.items())}  ",
        f"{step.model}, {step.seq_length} tokens x {step.micro_batch_size}, {step.micro_batches} "
        f"micro-batch(es), {tokens} random tokens a step, tensor parallel {step.tensor_parallel}; "
        f"median of {step.iterations} iterations after {step.warm_up} (10 to 90 %), ms; in brackets "
        f"the ratio to {base['side']}"
        f"{'; the optimizer never stepped, its moments take no memory' * step.skip_optimizer}  ",
        "",
        "| | " + " | ".join(side["side"] for side in sides) + " |",
        "|---|" + "---|" * len(sides),
    ]
    for part in ("forward and backward", *PARTS):
        cells = []
        for side in sides:
            time = side["times"].get(part)
            if time is None:
                cells.append("")
                continue
            cell = f"{time['median']:.1f} ({time['low']:.1f} to {time['high']:.1f})"
            if side is not base and part in base["times"]:
                cell += f" [{time['median'] / base['times'][part]['median']:.3f}]"
            cells.append(cell)
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    for name, what in (
        ("with state", "peak GB of forward and backward, FP32 optimizer state inside"),
        ("without state", "the same without optimizer state"),
        ("whole step", "peak GB of the whole step"),
    ):
        cells = []
        for side in sides:
            number, first = side["memory"][name], base["memory"][name]
            cell = f"{number / 1e9:.2f}" if number else "no GPU"
            cells.append(cell + (f" [{number / first:.3f}]" if number and side is not base else ""))
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    lines.append(
        "| model TFLOP/s a GPU | " + " | ".join(f"{s['tflop_s']:.0f}" for s in sides) + " |"
    )
    for key, what in (("loss", "cross-entropy"), ("attention", "attention")):
        lines.append(f"| {what} | " + " | ".join(side[key] for side in sides) + " |")
    ends = " | ".join(f"{s['first_loss']:.4f} / {s['last_loss']:.4f}" for s in sides)
    lines.append(f"| loss, first / last iteration | {ends} |")
    return "\n".join(lines) + "\n"


def picture(sides: list[dict[str, Any]], path: Path) -> bool:
    """Draw time and memory of each side; return whether matplotlib was there to do it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 0.6 * len(sides) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [side["side"] for side in sides]
    start = [0.0] * len(sides)
    for part in ("forward", "backward", "optimizer"):
        if part not in sides[0]["times"]:
            continue
        widths = [side["times"][part]["median"] for side in sides]
        left.barh(names, widths, left=start, label=part)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    left.set_xlabel("ms")
    left.legend(fontsize="small")
    left.invert_yaxis()
    right.barh(names, [side["memory"]["with state"] / 1e9 for side in sides], color="0.6")
    right.set_xlabel("peak GB, optimizer state inside")
    write_svg(path, figure)
    return True
