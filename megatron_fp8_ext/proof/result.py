"""All figures of a report, each computed once; the page, the Markdown and the JSON only show them."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.files import write_atomically
from megatron_fp8_ext.megatron_plugin import arguments, packed_flags
from megatron_fp8_ext.proof import verdict
from megatron_fp8_ext.proof.plan import BASELINE
from megatron_fp8_ext.proof.record import Run
from megatron_fp8_ext.proof.verdict import Interval, Verdict

# Dense BF16 peak of a GPU, TFLOP/s without sparsity, by a word of its name (NVIDIA's data sheets).
# MFU is against it in every precision, so that it compares.
_PEAK_TERAFLOPS = {"H100 PCIe": 756.0, "GH200": 989.0, "H100": 989.0, "H200": 989.0, "H800": 989.0}
# Megatron's own check stops a run whose loss or gradient is not a number.
_STOPPED_ON = re.compile(r"found (NaN|Inf)")
_SKIPPED_AT_START = 3  # iterations whose time is compilation and allocation


@dataclass(frozen=True)
class RunResult:
    """One run's figures; None where it has none.

    Attributes:
        run: the record.
        final_loss: mean over the verdict's window; None unless finished and all finite.
        diverged: finished or not, a loss of the window is missing or infinite.
        gap: relative to BF16 of the same seed.
        milliseconds: median of an iteration.
        tokens_per_second: of the whole run, all GPUs; None for packed samples, whose lengths differ.
        mfu: model FLOP utilization against the BF16 peak of the device.
        gemms_per_iteration: quantized GEMMs, by kind, on one rank.
    """

    run: Run
    final_loss: float | None
    diverged: bool
    gap: float | None
    milliseconds: float | None
    tokens_per_second: float | None
    mfu: float | None
    gemms_per_iteration: dict[str, int]


@dataclass(frozen=True)
class RecipeResult:
    """One recipe over its seeds."""

    recipe: str
    is_fp8: bool
    control: bool
    runs: tuple[RunResult, ...]
    gap: Interval | None
    verdict: Verdict

    def mean(self, of: Callable[[RunResult], float | None]) -> float | None:
        """Mean over the runs that have the figure."""
        found = [value for run in self.runs if (value := of(run)) is not None]
        return statistics.fmean(found) if found else None

    @property
    def gemms_per_iteration(self) -> int:
        """Quantized GEMMs of an iteration on one rank, the smallest of its runs."""
        return min((sum(run.gemms_per_iteration.values()) for run in self.runs), default=0)


@dataclass(frozen=True)
class ScoreRow:
    """One score of one recipe: mean over seeds, and paired difference to BF16."""

    name: str
    recipe: str
    mean: float
    difference: Interval | None


@dataclass(frozen=True)
class Result:
    """The comparison.

    Attributes:
        recipes: BF16 first, negative controls last.
        seed_spread: standard deviation of BF16's final losses over the seeds, relative to their mean;
            None with fewer than two.
        headline: one sentence.
        control_note: what the negative controls say of the comparison itself.
        scores: what `--score` measured.
    """

    recipes: tuple[RecipeResult, ...]
    steps: int
    seeds: tuple[int, ...]
    versions: dict[str, str]
    data: dict[str, Any]
    seed_spread: float | None
    headline: str
    control_note: str
    scores: tuple[ScoreRow, ...]

    @property
    def runs(self) -> Iterable[RunResult]:
        """Every run."""
        return (run for recipe in self.recipes for run in recipe.runs)


def build(runs: Sequence[Run]) -> Result:
    """Compute the report of comparable runs (from `record.read_all`).

    Raises:
        UserError: no BF16 run among them.
    """
    names = list(dict.fromkeys(run.recipe for run in runs))
    if BASELINE not in names:
        raise UserError(
            f"no {BASELINE} run among {', '.join(names)}: there is nothing to compare to"
        )
    steps = runs[0].steps
    base = {run.seed: run for run in runs if run.recipe == BASELINE}
    seeds = tuple(sorted({run.seed for run in runs}))
    measured = {
        name: [_run(r, base.get(r.seed)) for r in runs if r.recipe == name] for name in names
    }
    recipes = [_recipe(name, measured[name], steps, len(seeds)) for name in names]
    recipes, note = _held_to_controls(recipes)
    finals = [r.final_loss for r in measured[BASELINE] if r.final_loss is not None]
    spread = statistics.stdev(finals) / statistics.fmean(finals) if len(finals) > 1 else None
    return Result(
        recipes=tuple(recipes),
        steps=steps,
        seeds=seeds,
        versions=next((run.versions for run in runs if run.versions), {}),
        data=runs[0].described["data"],
        seed_spread=spread,
        headline=_headline(recipes, steps),
        control_note=note,
        scores=_scores(runs),
    )


def _run(run: Run, base: Run | None) -> RunResult:
    window = verdict.window(run.steps)
    own = [run.losses.get(number) for number in window]
    complete = run.status == "finished" and all(x is not None and math.isfinite(x) for x in own)
    final = statistics.fmean(x for x in own if x is not None) if complete else None
    # Only iterations that were logged: Megatron prints no loss where it is not a number.
    lost = [i for i in run.iterations.values() if i.number > 2 and not _finite(i.loss)]
    gap = None
    if final is not None and base is not None and base is not run and base.status == "finished":
        other = [base.losses.get(number) for number in window]
        if all(x is not None and math.isfinite(x) for x in other):
            theirs = statistics.fmean(x for x in other if x is not None)
            gap = (final - theirs) / theirs
    times = [i.milliseconds for i in run.iterations.values() if math.isfinite(i.milliseconds)]
    times = times[_SKIPPED_AT_START:] or times
    milliseconds = statistics.median(times) if times else None
    batch = next((i.global_batch_size for i in reversed(run.iterations.values())), None)
    tokens = None
    packed = arguments.has(run.described["argv"], packed_flags.DATA)  # its batch counts samples
    if batch and run.sequence_length and milliseconds and not packed:
        tokens = batch * run.sequence_length / milliseconds * 1000
    return RunResult(
        run=run,
        final_loss=final,
        diverged=any(i.number in window for i in lost) or bool(_STOPPED_ON.search(run.why)),
        gap=gap,
        milliseconds=milliseconds,
        tokens_per_second=tokens,
        mfu=_mfu(run),
        gemms_per_iteration=_gemms(run),
    )


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def peak_teraflops(device: str) -> float | None:
    """Return the dense BF16 peak of a GPU by its name, in TFLOP/s; None if it is not known."""
    return next((value for word, value in _PEAK_TERAFLOPS.items() if word in device), None)


def _mfu(run: Run) -> float | None:
    peak = peak_teraflops(run.versions.get("device", ""))
    rates = [i.teraflops for i in run.iterations.values() if i.teraflops]
    if peak is None or not rates:
        return None
    return statistics.median(rates[_SKIPPED_AT_START:] or rates) / peak


def _gemms(run: Run) -> dict[str, int]:
    """From the taps; without a sample, from the emulation's own count of its casts."""
    if run.samples:
        last = run.samples[-1]["iteration"]
        total: Counter[str] = Counter()
        for record in run.samples:
            if record["iteration"] == last:
                total.update(record["gemms"])
        return dict(total)
    if run.casts and run.iterations:
        kinds = {"fprop": "weight", "dgrad": "grad rows", "wgrad": "grad columns"}
        done = len(run.iterations)
        return {kind: run.casts.get(cast, 0) // done for kind, cast in kinds.items()}
    return {}


def _recipe(name: str, runs: Sequence[RunResult], steps: int, seeds: int) -> RecipeResult:
    first = runs[0].run
    gaps = [run.gap for run in runs if run.gap is not None]
    gap = verdict.interval(gaps) if gaps and name != BASELINE else None
    result = RecipeResult(
        name, first.is_fp8, first.control, tuple(runs), gap, Verdict("baseline", "")
    )
    if name == BASELINE:
        return result
    found = verdict.judge(
        gap,
        steps=steps,
        planned=seeds,
        diverged=sum(run.diverged for run in runs),
        gemms=result.gemms_per_iteration if first.is_fp8 else 1,
        trained_alike=len(gaps) == seeds,
    )
    return RecipeResult(name, first.is_fp8, first.control, tuple(runs), gap, found)


def _held_to_controls(recipes: list[RecipeResult]) -> tuple[list[RecipeResult], str]:
    """A comparison that a negative control passes cannot tell good from bad: nothing is lossless."""
    controls = [recipe for recipe in recipes if recipe.control]
    if not controls:
        return recipes, (
            "There is no negative control in this report (--recipes ...,control-e5m2): it does not show "
            "that the comparison could have told a bad recipe from a good one."
        )
    failed = [recipe.recipe for recipe in controls if recipe.verdict.kind == "not lossless"]
    if failed:
        return recipes, f"The negative control {' and '.join(failed)} failed the rule, as it must."
    why = "no negative control failed, so this comparison cannot tell good from bad"
    held = [
        RecipeResult(r.recipe, r.is_fp8, r.control, r.runs, r.gap, Verdict("inconclusive", why))
        if r.verdict.kind == "lossless"
        else r
        for r in recipes
    ]
    names = " and ".join(recipe.recipe for recipe in controls)
    return held, f"The negative control {names} did NOT fail the rule: {why}."


def _headline(recipes: Sequence[RecipeResult], steps: int) -> str:
    parts = [
        f"{r.recipe}: {r.verdict.kind}" for r in recipes if r.recipe != BASELINE and not r.control
    ]
    return f"{'; '.join(parts) or 'nothing to compare'} (against {BASELINE}, {steps} steps)"


def _scores(runs: Sequence[Run]) -> tuple[ScoreRow, ...]:
    rows = []
    base = {run.seed: run.scores for run in runs if run.recipe == BASELINE}
    for name in dict.fromkeys(name for run in runs for name in run.scores):
        for recipe in dict.fromkeys(run.recipe for run in runs):
            own = {r.seed: r.scores[name] for r in runs if r.recipe == recipe and name in r.scores}
            if not own:
                continue
            pairs = [own[s] - base[s][name] for s in own if name in base.get(s, {})]
            difference = verdict.interval(pairs) if pairs and recipe != BASELINE else None
            rows.append(ScoreRow(name, recipe, statistics.fmean(own.values()), difference))
    return tuple(rows)


def layer_errors(recipe: RecipeResult) -> dict[str, list[tuple[str, dict[str, float | None]]]]:
    """Return operand -> [(layer and linear, means of sqnr_db, underflow, saturation)], in order.

    Means over all samples and seeds; SQNR is averaged in dB over the samples that have noise.
    """
    collected: dict[tuple[str, int, str], dict[str, list[float]]] = {}
    for result in recipe.runs:
        for record in result.run.samples:
            for row in record["layers"]:
                key = (row["operand"], row["layer"], row["linear"])
                kept = collected.setdefault(key, {})
                for name in ("sqnr_db", "underflow", "saturation"):
                    if row[name] is not None:
                        kept.setdefault(name, []).append(row[name])
    errors: dict[str, list[tuple[str, dict[str, float | None]]]] = {}
    for operand, layer, linear in sorted(collected, key=lambda k: (k[0], k[1])):
        values = collected[operand, layer, linear]
        means = {
            name: statistics.fmean(values[name]) if values.get(name) else None
            for name in ("sqnr_db", "underflow", "saturation")
        }
        errors.setdefault(operand, []).append((f"{layer} {linear}", means))
    return errors


def operand_errors(recipe: RecipeResult) -> dict[str, dict[str, float | None]]:
    """Return operand -> mean and worst SQNR, largest underflow and saturation of any layer."""
    worst: dict[str, dict[str, float | None]] = {}
    for operand, layers in layer_errors(recipe).items():
        quality = [e["sqnr_db"] for _, e in layers if e["sqnr_db"] is not None]
        worst[operand] = {
            "mean_sqnr_db": statistics.fmean(quality) if quality else None,
            "worst_sqnr_db": min(quality, default=None),
            "underflow": max((e["underflow"] or 0.0 for _, e in layers), default=0.0),
            "saturation": max((e["saturation"] or 0.0 for _, e in layers), default=0.0),
        }
    return worst


def tap_cost(recipe: RecipeResult) -> float | None:
    """Seconds of a numerics sample, the median; None without samples."""
    seconds = [s["tap_seconds"] for r in recipe.runs for s in r.run.samples]
    return statistics.median(seconds) if seconds else None


def write_json(result: Result, path: Path) -> Path:
    """Write the figures for other programs."""
    recipes = []
    for recipe in result.recipes:
        gap = recipe.gap
        recipes.append(
            {
                "recipe": recipe.recipe,
                "control": recipe.control,
                "verdict": recipe.verdict.kind,
                "why": recipe.verdict.why,
                "gap": None if gap is None else gap.mean,
                "gap_interval": None if gap is None or gap.count < 2 else [gap.low, gap.high],
                "quantized_gemms_per_iteration": recipe.gemms_per_iteration,
                "errors": operand_errors(recipe),
                "runs": [
                    {
                        "folder": r.run.folder.name,
                        "seed": r.run.seed,
                        "status": r.run.status,
                        "final_loss": r.final_loss,
                        "gap": r.gap,
                        "ms_per_iteration": r.milliseconds,
                        "tokens_per_second": r.tokens_per_second,
                        "mfu": r.mfu,
                        "peak_gpu_mb": r.run.peak_gpu_mb,
                        "peak_resident_mb": r.run.peak_resident_mb,
                        "scores": r.run.scores,
                    }
                    for r in recipe.runs
                ],
            }
        )
    return write_atomically(
        path,
        json.dumps(
            {
                "headline": result.headline,
                "control": result.control_note,
                "steps": result.steps,
                "seeds": result.seeds,
                "margin": verdict.MARGIN,
                "seed_spread": result.seed_spread,
                "versions": result.versions,
                "data": result.data,
                "recipes": recipes,
            },
            indent=1,
            allow_nan=False,
        ),
    )
