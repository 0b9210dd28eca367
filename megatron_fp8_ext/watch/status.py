"""From readings to the figures on the screen. Pure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_fp8_ext.proof.result import peak_teraflops
from megatron_fp8_ext.watch.readings import Reading, Readings

_RECENT = 20  # iterations that rates and times are taken from
_ETA_WINDOW = 200


@dataclass(frozen=True, kw_only=True)
class Status:
    """A run at one moment; None where a figure is not known.

    Attributes:
        iteration: last logged one.
        total: planned iterations.
        loss: of that iteration.
        validation: (iteration, loss) of the last validation.
        learning_rate: of that iteration.
        grad_norm: of that iteration.
        reward: mean raw reward of the last rollout.
        seconds: median time of an iteration, of the recent ones.
        tokens_per_second: of the whole run, all GPUs.
        tokens: seen so far.
        world_size: number of ranks.
        teraflops: TFLOP/s of each GPU, by the trainer's own count.
        mfu: model FLOP utilization against the BF16 peak of the device.
        eta: seconds to the last iteration, with validations and checkpoints where times are known.
        updated: when the run logged last, seconds since 1970.
        device: name of the GPU; empty if not known.
        recipe: FP8 recipe; empty if not known.
        losses: by iteration.
        learning_rates: by iteration.
        notes: why a figure is missing.
    """

    iteration: int
    total: int | None
    loss: float | None
    validation: tuple[int, float] | None
    learning_rate: float | None
    grad_norm: float | None
    reward: float | None
    seconds: float | None
    tokens_per_second: float | None
    tokens: int | None
    world_size: int | None
    teraflops: float | None
    mfu: float | None
    eta: float | None
    updated: float | None
    device: str
    recipe: str
    losses: Mapping[int, float]
    learning_rates: Mapping[int, float]
    notes: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether the last planned iteration is logged."""
        return self.total is not None and self.iteration >= self.total


def status(readings: Readings, peak: float | None = None) -> Status | None:
    """Return the figures of a run, or None before its first iteration.

    Args:
        readings: what it logged.
        peak: dense BF16 peak of one GPU in TFLOP/s; None to look it up by the device's name.
    """
    losses = readings.get("lm loss", "train/loss")
    rates = readings.get("learning-rate", "train/lr-pg_0")
    arguments = readings.arguments
    steps = [next(reversed(series)) for series in (losses, rates) if series]
    if not steps:
        return None
    iteration, total = max(steps), _total(arguments)
    seconds = _seconds(readings, losses)
    batch = _last(readings.get("batch-size"))
    length = _whole(arguments, "seq_length")
    packed = arguments.get("sft_data", "None") not in ("None", "")
    notes = []
    tokens_per_second = _last(readings.get("perf/actor_train_tok_per_s"))
    seen = None
    if packed:
        notes.append(
            "tokens/s and MFU: packs differ in length, and Megatron counts each sample as a full sequence"
        )
    elif batch and length:
        tokens_per_second = batch * length / seconds if seconds else None
        seen = _tokens(readings.get("batch-size"), length, iteration)
    elif tokens_per_second is None:
        notes.append("tokens/s: neither the files nor run.json name --seq-length")
    teraflops = None if packed else _median(readings, "throughput", "perf/actor_train_tflops")
    device = arguments.get("fp8_ext_device", "")
    peak = peak if peak is not None else peak_teraflops(device)
    if not packed and teraflops is None:
        notes.append("MFU: needs --log-throughput (and --log-timers-to-tensorboard) in the run")
    elif not packed and peak is None:
        notes.append(f"MFU: no BF16 peak known for '{device or 'the device'}'; give --peak-tflops")
    grad_norm = _last(readings.get("grad-norm", "train/grad_norm"))
    validation = readings.get("lm loss validation")
    return Status(
        iteration=iteration,
        total=total,
        loss=_last(losses),
        validation=(max(validation), _last(validation) or 0.0) if validation else None,
        learning_rate=_last(rates),
        grad_norm=grad_norm,
        reward=_last(readings.get("rollout/raw_reward")),
        seconds=seconds,
        tokens_per_second=tokens_per_second,
        tokens=seen,
        world_size=_whole(arguments, "world_size"),
        teraflops=teraflops,
        mfu=teraflops / peak if teraflops is not None and peak else None,
        eta=_eta(readings, rates or losses, total, iteration, seconds),
        updated=readings.updated,
        device=device,
        recipe=arguments.get("fp8_ext_recipe", ""),
        losses={step: reading.value for step, reading in losses.items()},
        learning_rates={step: reading.value for step, reading in rates.items()},
        notes=tuple(notes),
    )


def _last(series: Mapping[int, Reading]) -> float | None:
    return series[next(reversed(list(series)))].value if series else None


def _whole(arguments: Mapping[str, str], name: str) -> int | None:
    text = arguments.get(name, "")
    return int(text) if text.isdigit() else None


def _total(arguments: Mapping[str, str]) -> int | None:
    """Megatron's iterations; slime's rollouts times the optimizer steps of each."""
    rollouts = _whole(arguments, "num_rollout")
    if rollouts is None:
        return _whole(arguments, "train_iters")
    batch, samples, steps = (
        _whole(arguments, name)
        for name in ("rollout_batch_size", "n_samples_per_prompt", "global_batch_size")
    )
    return rollouts * max(batch * (samples or 1) // steps, 1) if batch and steps else None


def _median(readings: Readings, *tags: str) -> float | None:
    """Of the recent ones, without the first of a start: it compiles and allocates."""
    tag = next((tag for tag in tags if readings.series.get(tag)), None)
    if tag is None:
        return None
    series, start = readings.series[tag], readings.attempt[tag]
    own = [reading.value for step, reading in series.items() if step > start]
    recent = (own or [reading.value for reading in series.values()])[-_RECENT:]
    return statistics.median(recent)


def _intervals(readings: Readings, series: Mapping[int, Reading], count: int) -> list[float]:
    """Seconds an iteration between logged iterations of the last start."""
    start = max(readings.attempt.values(), default=0)
    times = [
        (step, reading.time)
        for step, reading in series.items()
        if step >= start and reading.time is not None
    ]
    return [
        (after - before) / (step - last)
        for (last, before), (step, after) in itertools.pairwise(times)
    ][-count:]


def _seconds(readings: Readings, series: Mapping[int, Reading]) -> float | None:
    found = _median(readings, "iteration-time")
    if found is None:
        intervals = _intervals(readings, series, _RECENT)
        found = statistics.median(intervals) if intervals else None
    return found


def _eta(
    readings: Readings,
    series: Mapping[int, Reading],
    total: int | None,
    iteration: int,
    seconds: float | None,
) -> float | None:
    if total is None:
        return None
    intervals = _intervals(readings, series, _ETA_WINDOW)
    each = statistics.fmean(intervals) if intervals else seconds
    return None if each is None else max(total - iteration, 0) * each


def _tokens(batches: Mapping[int, Reading], length: int, iteration: int) -> int:
    """Tokens up to `iteration`; what lies before the first logged one was like it."""
    total, last, size = 0.0, 0, 0.0
    for step, reading in batches.items():
        total += (step - last) * reading.value
        last, size = step, reading.value
    return int((total + (iteration - last) * size) * length)
