"""A decay branch: from one checkpoint of a stable run, the learning rate decays to its end. Pure.

What Megatron needs for it by hand: `--ckpt-step`, `--override-opt_param-scheduler`, an end that is the
checkpoint's own position plus the decay, and data sized as for the stable run. Two things it cannot do
with flags are done while it loads (`branch_load`) and builds its data (`data_order`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_fp8_ext.checkpoint.layout import CheckpointLayout
from megatron_fp8_ext.checkpoint.sample_plan import SamplePlan
from megatron_fp8_ext.checkpoint.state import TrainingState
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin.checks import is_number
from megatron_fp8_ext.schedule import STYLES, WSD, DecayStyle

FROM = "--wsd-decay-from"
PLANNED = "--wsd-planned-samples"
# Megatron's attribute -> its flag: what, beside the size, fixes the order of the training data.
ORDER: dict[str, str] = {
    "seed": "--seed",
    "seq_length": "--seq-length",
    "split": "--split",
    "dataloader_type": "--dataloader-type",
    "mid_level_dataset_surplus": "--mid-level-dataset-surplus",
    "rampup_batch_size": "--rampup-batch-size",
    "step_batch_size_schedule": "--step-batch-size-schedule",
    "phase_transition_iterations": "--phase-transition-iterations",
    "mock_data": "--mock-data",
}
# The corpora: their number and weights are compared here, their sizes when they are opened.
DATA: dict[str, str] = {"data_path": "--data-path", "train_data_path": "--train-data-path"}


@dataclass(frozen=True, kw_only=True)
class BranchPoint:
    """Where a branch leaves the stable run, read from the checkpoint there.

    Attributes:
        checkpoint: folder of the stable run.
        iteration: of the checkpoint.
        consumed_samples: training samples consumed until there.
        scheduler_samples: the same as the schedule counts them (without skipped steps).
        global_batch_size: samples of an iteration.
        seq_length: tokens of a sample.
        by_samples: whether the stable run counts in `--train-samples`.
        lr: the stable learning rate.
        min_lr: the stable run's `--min-lr`.
        warmup_samples: length of its warmup.
        decay_style: the decay it planned; cosine if it planned none.
        planned_samples: samples that its training data was sized for.
        available_samples: samples that data holds; None where only building it tells.
        order: the arguments in ORDER, as the stable run had them.
        plan: the recorded sample plan; None for a checkpoint that is not ours.
    """

    checkpoint: str
    iteration: int
    consumed_samples: int
    scheduler_samples: int
    global_batch_size: int
    seq_length: int
    by_samples: bool
    lr: float
    min_lr: float
    warmup_samples: int
    decay_style: DecayStyle
    planned_samples: int
    available_samples: int | None = None
    order: Mapping[str, Any] = field(default_factory=dict)
    plan: SamplePlan | None = None

    @property
    def name(self) -> str:
        """The checkpoint, as the command may name it."""
        return f"{self.checkpoint}/iter_{self.iteration:07d}"


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A branch point and what the command makes of it.

    Attributes:
        point: where it begins.
        decay_iters: its length.
        decay_style: its shape.
        lr: learning rate it starts at; other than the point's, it is a jump.
        min_lr: learning rate it ends at.
    """

    point: BranchPoint
    decay_iters: int
    decay_style: DecayStyle
    lr: float
    min_lr: float

    @property
    def decay_samples(self) -> int:
        """Length of the decay."""
        return self.decay_iters * self.point.global_batch_size

    @property
    def end_iteration(self) -> int:
        """Last iteration."""
        return self.point.iteration + self.decay_iters

    @property
    def end_samples(self) -> int:
        """Training samples consumed at the end."""
        return self.point.consumed_samples + self.decay_samples

    @property
    def schedule(self) -> WSD:
        """The learning rate from the branch point on, in samples of the schedule."""
        return WSD(
            lr=self.lr,
            min_lr=self.min_lr,
            warmup_samples=min(self.point.warmup_samples, self.point.scheduler_samples),
            total_samples=self.point.scheduler_samples + self.decay_samples,
            decay_samples=self.decay_samples,
            decay_style=self.decay_style,
        )

    def flags(self, load: str | None) -> dict[str, str]:
        """Return Megatron's flags and values.

        Args:
            load: the branch's own folder once it holds a checkpoint, else None. Until then the
                learning rates are the stable run's: they are part of the key by which Megatron
                0.19 finds its optimizer state; `branch_load` changes them after loading.
        """
        point, wsd = self.point, self.schedule
        if load is None:
            out = {"--load": point.checkpoint, "--ckpt-step": str(point.iteration)}
            lr, min_lr = point.lr, point.min_lr
        else:
            out = {"--load": load}
            lr, min_lr = self.lr, self.min_lr
        out |= {"--lr": repr(lr), "--min-lr": repr(min_lr), "--lr-decay-style": "WSD"}
        out |= {"--lr-wsd-decay-style": self.decay_style}
        out |= {"--global-batch-size": str(point.global_batch_size)}
        counts = {
            "--lr-warmup": wsd.warmup_samples,
            "--lr-decay": wsd.total_samples,
            "--lr-wsd-decay": wsd.decay_samples,
        }
        if point.by_samples:
            out |= {"--train-samples": str(self.end_samples)}
            out |= {f"{flag}-samples": str(count) for flag, count in counts.items()}
        else:
            out |= {"--train-iters": str(self.end_iteration)}
            size = point.global_batch_size
            out |= {f"{flag}-iters": str(count // size) for flag, count in counts.items()}
        return out


def point_at(
    state: TrainingState,
    layout: CheckpointLayout,
    plan: SamplePlan | None,
    planned_samples: int | None,
) -> BranchPoint:
    """Return the branch point at a checkpoint.

    Args:
        state: the checkpoint's common state.
        layout: its layout.
        plan: the sample plan beside it.
        planned_samples: what the user says with `--wsd-planned-samples`.

    Raises:
        UserError: no branch can start there; the reason and the mend.
    """
    where = f"{FROM} {state.path}"
    if layout.optimizer == "none" or not state.scheduler:
        raise UserError(
            f"{where}: the checkpoint holds no optimizer state (it was saved with --no-save-optim, or "
            "is a converted model); give one that does"
        )
    args = state.args
    needed = ("global_batch_size", "seq_length", "consumed_train_samples")
    missing = [name for name in needed if not isinstance(args.get(name), int)]
    if missing:
        raise UserError(
            f"{where}: it does not hold the run's arguments ({', '.join(missing)} missing); give a "
            "checkpoint that Megatron-LM saved"
        )
    size, seq, consumed = (int(args[name]) for name in needed)
    by_samples = bool(args.get("train_samples"))
    ramped = bool(args.get("rampup_batch_size") or args.get("step_batch_size_schedule"))
    position = int(state.scheduler["num_steps"])
    if position % size or (consumed != state.iteration * size and not (by_samples and ramped)):
        raise UserError(
            f"{where}: {consumed} samples in {state.iteration} iterations are not of one "
            f"--global-batch-size {size}: it changed during the stable run, and Megatron cannot count "
            "the branch in iterations; branch from a checkpoint before the change"
        )
    warmup, decay_start, style = _stable_phase(state, size, by_samples)
    if position < warmup:
        raise UserError(
            f"{where} is inside the warmup, which ends at iteration {math.ceil(warmup / size)}: give a "
            "later checkpoint"
        )
    if decay_start is not None and position > decay_start:
        raise UserError(
            f"{where} is inside the decay, which began at iteration {decay_start // size}: give that "
            "checkpoint or an earlier one"
        )
    derived = args.get("train_samples") or (args.get("train_iters") or 0) * size
    planned = planned_samples or (plan.planned_samples if plan else derived)
    if plan and planned_samples and planned_samples != plan.planned_samples:
        raise UserError(
            f"{PLANNED} {planned_samples} contradicts {state.path}/sample_plan.json, which says "
            f"{plan.planned_samples}: drop the flag"
        )
    if not planned:
        raise UserError(
            f"{where}: it does not say how many samples the stable run's data was sized for; add "
            f"{PLANNED} N (its --train-samples, or --train-iters x --global-batch-size)"
        )
    return BranchPoint(
        checkpoint=str(state.path.parent),
        iteration=state.iteration,
        consumed_samples=consumed,
        scheduler_samples=position,
        global_batch_size=size,
        seq_length=seq,
        by_samples=by_samples,
        lr=float(state.scheduler["max_lr"]),
        min_lr=float(state.scheduler["min_lr"]),
        warmup_samples=int(warmup),
        decay_style=style,
        planned_samples=int(planned),
        available_samples=plan.available_samples if plan else None,
        order={name: args[name] for name in (*ORDER, *DATA) if name in args},
        plan=plan,
    )


def _stable_phase(
    state: TrainingState, size: int, by_samples: bool
) -> tuple[float, int | None, DecayStyle]:
    """Return (end of the warmup, start of the decay or None, decay style), in samples."""
    scheduler, args = state.scheduler, state.args
    style = scheduler.get("lr_decay_style")
    if style == "constant":
        return float(scheduler["lr_warmup_steps"]), None, "cosine"
    if style != "WSD":
        raise UserError(
            f"{FROM} {state.path}: its learning rate follows --lr-decay-style {style}, which has no "
            "stable phase; branch from a run with --lr-schedule wsd or --lr-decay-style constant"
        )
    if by_samples:
        decay = int(args.get("lr_wsd_decay_samples") or 0)
    else:
        decay = int(args.get("lr_wsd_decay_iters") or 0) * size
    planned = args.get("lr_wsd_decay_style")
    return (
        float(scheduler["lr_warmup_steps"]),
        int(scheduler["lr_decay_steps"]) - decay,
        next((s for s in STYLES if decay and s == planned), "cosine"),
    )


def same_order(branch: Branch, parsed: Any) -> None:
    """Check that the parsed command orders its data as the stable run did.

    Raises:
        UserError: names the flag and both values.
    """
    for name, flag in ORDER.items():
        if name not in branch.point.order:
            continue
        theirs, ours = branch.point.order[name], getattr(parsed, name, None)
        if name == "dataloader_type":
            theirs, ours = theirs or "single", ours or "single"
        if isinstance(theirs, tuple):
            theirs = list(theirs)
        if isinstance(ours, tuple):
            ours = list(ours)
        if name in ("split", "seed", "mid_level_dataset_surplus") and ours is None:
            continue
        if theirs != ours:
            raise UserError(
                f"{FROM} {branch.point.name}: {flag} is {ours} here and was {theirs} in the stable run, "
                "so the data would come in another order; give the stable run's value"
            )
    for name, flag in DATA.items():
        theirs, ours = branch.point.order.get(name), getattr(parsed, name, None)
        if _blend(theirs) != _blend(ours):
            raise UserError(
                f"{FROM} {branch.point.name}: {flag} has {_blend(ours)} here and had {_blend(theirs)} in "
                "the stable run, so the data would come in another order; give the stable run's data"
            )
    kind = branch.point.order.get("dataloader_type") or "single"
    if kind != "single":
        raise UserError(
            f"{FROM} {branch.point.name}: --dataloader-type {kind} orders the data by more than the sample "
            "plan; only single can be branched"
        )


def _blend(paths: Any) -> str:
    """Describe a `--data-path` by what must not change: number of corpora and their weights."""
    parts = [str(part) for part in paths or ()]
    weights = [float(part) for part in parts[::2] if is_number(part)]
    if len(parts) > 1 and 2 * len(weights) == len(parts) and sum(weights) > 0:
        shares = ", ".join(f"{weight / sum(weights):.4g}" for weight in weights)
        return f"{len(weights)} corpora with the weights {shares}"
    return f"{len(parts)} corpora" if len(parts) != 1 else "1 corpus"


def enough_data(branch: Branch, available: int | None) -> None:
    """Check that the stable run's data lasts until the end of the branch.

    Raises:
        UserError: with the longest decay that fits.
    """
    if available is None or branch.end_samples <= available:
        return
    point = branch.point
    longest = (available - point.consumed_samples) // point.global_batch_size
    if longest > 0:
        mend = f"decay over at most {longest} iterations, or branch from an earlier checkpoint"
    else:
        mend = "branch from an earlier checkpoint"
    raise UserError(
        f"{FROM} {point.name}: the decay of {branch.decay_iters} iterations needs samples up to "
        f"{branch.end_samples}, and the data sized for the stable run's {point.planned_samples} samples "
        f"ends at {available}: {mend}"
    )
