"""The report's tables as text, the same in the page, in Markdown and on the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fp8_ext.proof import verdict
from megatron_fp8_ext.proof.plan import BASELINE
from megatron_fp8_ext.proof.result import (
    RecipeResult,
    Result,
    RunResult,
    layer_errors,
    operand_errors,
    tap_cost,
)
from megatron_fp8_ext.proof.verdict import Interval

RULE = (
    "The rule, fixed beforehand: lossless if the upper end of the two-sided "
    f"{verdict.CONFIDENCE:.0%} interval of the paired gap (same start, same batches in the same order; mean "
    f"loss of the last {verdict.WINDOW:.0%} of the steps, relative to BF16; Student's t over the seeds) is "
    f"below {verdict.MARGIN:.2%}; not lossless if its lower end is above that, or a run diverged; otherwise "
    "inconclusive, and also with one seed, with fewer than "
    f"{verdict.MINIMUM_STEPS} steps, with an unfinished run, or where no quantized GEMM was counted."
)
NONE = "-"  # where there is no figure


@dataclass(frozen=True)
class Table:
    """Text cells; `wordy` names the columns that hold sentences."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    wordy: tuple[str, ...] = ()


def number(value: float | None, form: str, factor: float = 1.0) -> str:
    """Format a figure; a dash where there is none."""
    return NONE if value is None else format(value * factor, form)


def percent(value: float | None, digits: int = 3) -> str:
    """Format a relative gap with its sign."""
    return NONE if value is None else f"{100 * value:+.{digits}f} %"


def _interval(gap: Interval | None) -> str:
    if gap is None or gap.count < 2:
        return NONE
    return f"{percent(gap.low)} to {percent(gap.high)}"


def verdicts(result: Result) -> Table:
    """One row a recipe."""
    base = result.recipes[0]
    rows = []
    for recipe in result.recipes:
        loss = recipe.mean(lambda run: run.final_loss)
        kind = recipe.verdict.kind
        finished = sum(run.run.status == "finished" for run in recipe.runs)
        rows.append(
            (
                recipe.recipe + (" (negative control)" if recipe.control else ""),
                kind,
                number(loss, ".5f"),
                percent(recipe.gap.mean if recipe.gap else None),
                _interval(recipe.gap),
                _in_spreads(recipe, result.seed_spread),
                _ratio(recipe, base),
                str(recipe.gemms_per_iteration),
                f"{finished} of {len(result.seeds)}",
                recipe.verdict.why,
            )
        )
    head = (
        "recipe", "verdict", "final loss", "gap", "95 % interval", "gap / seed spread", "time / BF16",
        "FP8 GEMMs per iteration", "runs finished", "why",
    )  # fmt: skip
    return Table(head, tuple(rows), ("why",))


def _in_spreads(recipe: RecipeResult, spread: float | None) -> str:
    if recipe.gap is None or not spread:
        return NONE
    return f"{recipe.gap.mean / spread:+.2f}"


def _ratio(recipe: RecipeResult, base: RecipeResult) -> str:
    own, other = (r.mean(lambda run: run.milliseconds) for r in (recipe, base))
    if own is None or other is None or recipe.recipe == BASELINE:
        return NONE
    return f"{own / other:.2f}"


def spread(result: Result) -> str:
    """The BF16 noise in a sentence; empty with one seed."""
    if result.seed_spread is None:
        return ""
    return (
        "From seed to seed BF16's own final loss has a standard deviation of "
        f"{100 * result.seed_spread:.3f} % ({len(result.seeds)} seeds): without pairing, "
        "a gap well inside of it could not be seen."
    )


def sharing(result: Result) -> str:
    """Whose times are not their own; empty where every run had its device to itself."""
    most = max((each.run.sharing for each in result.runs), default=1)
    if most == 1:
        return ""
    return (
        f"Up to {most} runs shared a device (--parallel): times, tokens/s and MFU are those of a shared one "
        "and say nothing of a recipe's speed. Losses do not depend on it."
    )


def members(result: Result) -> Table:
    """One row a run, the unfinished ones included."""
    head = (
        "run", "status", "iterations", "final loss", "gap", "ms / iteration", "tokens / s", "MFU",
        "peak GPU GB", "peak process GB", "last words",
    )  # fmt: skip
    return Table(head, tuple(_member(run) for run in result.runs), ("last words",))


def _member(r: RunResult) -> tuple[str, ...]:
    run = r.run
    return (
        run.folder.name,
        run.status,
        f"{max(run.iterations, default=0)} of {run.steps}",
        number(r.final_loss, ".5f") if not r.diverged else "diverged",
        percent(r.gap),
        number(r.milliseconds, ".1f"),
        number(r.tokens_per_second, ",.0f"),
        number(r.mfu, ".1%"),
        number(run.peak_gpu_mb, ".2f", 1 / 1024),
        number(run.peak_resident_mb, ".2f", 1 / 1024),
        run.why,
    )


def errors(result: Result) -> Table:
    """One row a recipe and operand."""
    rows = []
    for recipe in result.recipes:
        for operand, worst in operand_errors(recipe).items():
            rows.append(
                (
                    recipe.recipe,
                    operand,
                    number(worst["mean_sqnr_db"], ".2f"),
                    number(worst["worst_sqnr_db"], ".2f"),
                    number(worst["underflow"], ".4f", 100) + " %",
                    number(worst["saturation"], ".4f", 100) + " %",
                )
            )
    head = (
        "recipe", "operand", "SQNR dB, mean", "worst layer", "underflow, worst", "saturation, worst",
    )  # fmt: skip
    return Table(head, tuple(rows))


def errors_note(result: Result) -> str:
    """How the errors were measured, and what that cost."""
    costs = []
    for recipe in result.recipes:
        cost, step = tap_cost(recipe), recipe.mean(lambda run: run.milliseconds)
        if cost is not None and step:
            costs.append(f"{recipe.recipe} {1000 * cost:.0f} ms ({10 * cost / step:.2%})")
    return (
        "Sampled while training (--fp8-stats-interval). SQNR: signal to quantization noise. Underflow: "
        "share of values other than zero that became zero. Saturation: share clipped. Rows are the "
        "operands of fprop and dgrad, columns those of wgrad. "
        "Cost of one sample (share of the training time at --fp8-stats-interval 100): "
        f"{', '.join(costs) or 'not measured'}."
    )


def layers(result: Result) -> Table:
    """Every layer's casts."""
    rows = []
    for recipe in result.recipes:
        for operand, places in layer_errors(recipe).items():
            for place, values in places:
                rows.append(
                    (
                        recipe.recipe,
                        operand,
                        place,
                        number(values["sqnr_db"], ".2f"),
                        number(values["underflow"], ".4f", 100) + " %",
                        number(values["saturation"], ".4f", 100) + " %",
                    )
                )
    head = ("recipe", "operand", "layer", "SQNR dB", "underflow", "saturation")
    return Table(head, tuple(rows))


def scores(result: Result) -> Table:
    """What was measured after training."""
    rows = tuple(
        (
            row.name,
            row.recipe,
            f"{row.mean:.4f}",
            NONE if row.difference is None else f"{row.difference.mean:+.4f}",
            NONE
            if row.difference is None or row.difference.count < 2
            else f"{row.difference.low:+.4f} to {row.difference.high:+.4f}",
        )
        for row in result.scores
    )
    return Table(("score", "recipe", "mean", "difference to BF16", "95 % interval"), rows)


def facts(result: Result) -> Table:
    """Versions, data, seeds."""
    rows = [("steps", str(result.steps)), ("seeds", ", ".join(map(str, result.seeds)))]
    rows += [(name, value) for name, value in result.versions.items()]
    for name, data in result.data.items():
        rows.append((f"corpus {name}", f"{data['bytes']:,} bytes, digest {data['sha256'][:16]}"))
    return Table(("what", "value"), tuple(rows), ("value",))
