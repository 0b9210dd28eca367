"""How far the rollout's policy is from the trained one: measured every step, refused when too far.

For each response token slime has the log-probability that the server sampled it with and the one that
training computes for it before the step. With equal numbers on both sides they differ only by kernels; a
weight push that did not arrive, or another scale format, shows in the first step.

slime v0.3 leaves out that second forward pass where a rollout is one step (GRPO without a KL penalty: the
reference's stages), and takes the log-probabilities of the step itself. There they are measured inside the
loss, and judged after the backward pass, before the optimizer changes a weight.

Logged under slime's `rollout/` in TensorBoard and W&B: `rollout/train_rollout_kl` (the k3 estimate of
KL(rollout || train), nats a token), `rollout/train_rollout_logprob_abs_diff` (mean) and
`rollout/train_rollout_logprob_max_diff`.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import run

if TYPE_CHECKING:
    from torch import Tensor

# Mean absolute difference of log-probabilities; slime's own CI bound. 0.01 to 0.03 is usual for FP8.
DEFAULT_LIMIT = 0.1
_DONE = "_megatron_fp8_ext"


@dataclass(frozen=True)
class Mismatch:
    """Train against rollout over the response tokens of some samples.

    Attributes:
        train_rollout_kl: k3 estimate of KL(rollout || train), nats a token.
        train_rollout_logprob_abs_diff: mean absolute difference.
        train_rollout_logprob_max_diff: largest absolute difference.
    """

    train_rollout_kl: float
    train_rollout_logprob_abs_diff: float
    train_rollout_logprob_max_diff: float


def totals(train: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
    """Return `[kl, absolute difference, tokens, largest]` FP64: three sums and a maximum.

    Args:
        train: log-probabilities `[n]` computed by training.
        rollout: those of the server, of the same tokens.
        mask: 1 where the token is trained on.
    """
    import torch

    on = mask.to(torch.bool)
    diff = (train.double() - rollout.double())[on]
    if diff.numel() == 0:
        return torch.zeros(4, dtype=torch.float64, device=train.device)
    # k3 (Schulman): the expectation over the rollout policy of r - 1 - log r, r = train / rollout.
    k3 = torch.expm1(diff.clamp(max=30)) - diff
    tokens = diff.new_tensor(float(diff.numel()))
    return torch.stack([k3.sum(), diff.abs().sum(), tokens, diff.abs().max()])


def from_totals(sums: Tensor) -> Mismatch:
    """Return the means of `totals`."""
    kl, absolute, tokens, largest = (float(x) for x in sums)
    count = max(tokens, 1.0)
    return Mismatch(kl / count, absolute / count, largest)


def check(found: Mismatch, rollout_id: int, limit: float) -> None:
    """Refuse to train on a rollout of another policy.

    Raises:
        UserError: the mean difference is above `limit`, or not a number.
    """
    mean = found.train_rollout_logprob_abs_diff
    if mean <= limit:
        return
    raise UserError(
        f"rollout {rollout_id}: train and rollout log-probabilities differ by {mean:.3g} on average (at most "
        f"{found.train_rollout_logprob_max_diff:.3g}; KL {found.train_rollout_kl:.3g} nats a token), above "
        f"--max-train-rollout-diff {limit:g}: the servers do not run the trained weights, or not in the "
        "recipe's numbers; see docs/rl.md, 'When train and rollout differ'"
    )


def install(args: Any) -> list[str]:
    """Measure in the train actor, where slime logs the rollout; returns the replaced symbols."""
    actor = importlib.import_module("slime.backends.megatron_utils.actor")
    # slime HEAD calls it through a module, the reference's commit by name.
    place = getattr(actor, "train_metric_utils", actor)
    native = getattr(place, "log_rollout_data", None)
    if native is None:
        raise UserError(
            "this slime's train actor has no log_rollout_data; use slime 8359c9a or v0.3.x"
        )
    if hasattr(native, _DONE):
        return []

    @functools.wraps(native)
    def log_rollout_data(*positional: Any, **named: Any) -> Any:
        # (rollout_id, args, rollout_data) at both commits.
        values = dict(zip(("rollout_id", "args", "rollout_data"), positional, strict=False)) | named
        found = measure(values["rollout_data"])
        if found is not None:
            _record(found, values["rollout_id"], values["rollout_data"])
        elif values["rollout_data"].get("rollout_log_probs"):
            during_step.start(values["rollout_id"])
        result = native(*positional, **named)
        if found is not None:
            check(found, values["rollout_id"], _limit(args))
        return result

    setattr(log_rollout_data, _DONE, True)
    place.log_rollout_data = log_rollout_data  # type: ignore[union-attr]
    during_step = _DuringStep(args)
    symbols = [f"{place.__name__.removeprefix('slime.')}.log_rollout_data"]
    return symbols + during_step.install()


def _limit(args: Any) -> float:
    limit = getattr(args, "max_train_rollout_diff", None)
    return DEFAULT_LIMIT if limit is None else float(limit)


class _DuringStep:
    """The measure where slime computes training's log-probabilities in the step itself (v0.3)."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.rollout_id: int | None = None
        self.sums: Any = None

    def install(self) -> list[str]:
        """Listen in slime's policy loss and before its optimizer; returns the replaced symbols."""
        loss = importlib.import_module("slime.backends.megatron_utils.loss")
        model = importlib.import_module("slime.backends.megatron_utils.model")
        heard = getattr(loss, "_maybe_capture_log_probs", None)
        if heard is None:  # 8359c9a always computes them before the step
            return []
        finalize = model.finalize_model_grads

        def capture(batch: Any, log_probs: list[Tensor]) -> Any:
            self.add(batch, log_probs)
            return heard(batch, log_probs)

        @functools.wraps(finalize)
        def finalize_model_grads(*positional: Any, **named: Any) -> Any:
            self.judge()
            return finalize(*positional, **named)

        loss._maybe_capture_log_probs = capture  # type: ignore[attr-defined]
        model.finalize_model_grads = finalize_model_grads  # type: ignore[attr-defined]
        return [
            "megatron_utils.loss._maybe_capture_log_probs",
            "megatron_utils.model.finalize_model_grads",
        ]

    def start(self, rollout_id: int) -> None:
        self.rollout_id, self.sums = rollout_id, None

    def add(self, batch: Any, log_probs: list[Tensor]) -> None:
        """Count one micro-batch: its log-probabilities, and the server's in `batch`."""
        if self.rollout_id is None or not batch.get("rollout_log_probs"):
            return
        pairs = zip(log_probs, batch["rollout_log_probs"], strict=True)
        for index, (a, b) in enumerate(pairs):
            part = totals(a.detach(), b.to(a.device), _local_mask(batch, index, a))
            self.sums = part if self.sums is None else _merge(self.sums, part)

    def judge(self) -> None:
        """Reduce over the ranks, log and check; once a rollout."""
        from megatron.core import mpu

        # Of all pipeline stages the last one computes the loss.
        if self.rollout_id is None or not mpu.is_pipeline_last_stage():
            return
        rollout_id, self.rollout_id = self.rollout_id, None
        sums = self.sums
        if sums is None:  # this rank had no response token
            import torch

            device = _device()
            sums = torch.zeros(4, dtype=torch.float64, device=device)
        found = from_totals(_over_ranks(sums))
        _say(found, rollout_id)
        if _speaks():
            _track(self.args, found, rollout_id)
        check(found, rollout_id, _limit(self.args))


def _device() -> Any:
    """Return the device of this rank."""
    import torch

    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def _track(args: Any, found: Mismatch, rollout_id: int) -> None:
    """Log under the names that `log_rollout_data` would have used."""
    logs = importlib.import_module("slime.observability.logging_utils")
    steps = importlib.import_module("slime.observability.metric_utils")
    values = {f"rollout/{name}": value for name, value in asdict(found).items()}
    step = steps.compute_rollout_step(args, rollout_id)
    logs.log(args, {**values, "rollout/step": step}, step_key="rollout/step")


def _merge(sums: Tensor, part: Tensor) -> Tensor:
    import torch

    return torch.cat([sums[:3] + part[:3], torch.maximum(sums[3:], part[3:])])


def _over_ranks(sums: Tensor) -> Tensor:
    """Return `totals` of all data- and context-parallel ranks."""
    import torch
    import torch.distributed as dist
    from megatron.core import mpu

    if not dist.is_initialized():
        return sums
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    # NCCL reduces on the GPU that holds the log-probabilities, gloo on the CPU.
    added, largest = sums[:3].clone(), sums[3:].clone()
    dist.all_reduce(added, group=group)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return torch.cat([added, largest])


def measure(rollout_data: Any) -> Mismatch | None:
    """Return the mismatch over all ranks' samples; None where there is nothing to compare (SFT)."""
    import torch

    train, rollout = rollout_data.get("log_probs"), rollout_data.get("rollout_log_probs")
    # Only the last pipeline stage has them; its data-parallel group shares the verdict.
    if not train or not rollout:
        return None
    sums = torch.zeros(4, dtype=torch.float64, device=train[0].device)
    for index, (a, b) in enumerate(zip(train, rollout, strict=True)):
        sums = _merge(sums, totals(a, b.to(a.device), _local_mask(rollout_data, index, a)))
    return from_totals(_over_ranks(sums))


def _local_mask(rollout_data: Any, index: int, log_probs: Tensor) -> Tensor:
    """Return the sample's loss mask, cut to the tokens this context-parallel rank holds."""
    mask: Tensor = rollout_data["loss_masks"][index]
    if mask.shape == log_probs.shape:
        return mask
    cp = importlib.import_module("slime.backends.megatron_utils.cp_utils")
    cut = cp.slice_log_prob_with_cp(
        mask.tolist(),
        rollout_data["total_lengths"][index],
        rollout_data["response_lengths"][index],
    )
    return mask.new_tensor(cut)


def _record(found: Mismatch, rollout_id: int, rollout_data: Any) -> None:
    """Hand the figures to slime's logger, which averages a list over its ranks, and print them."""
    for name, value in asdict(found).items():
        rollout_data[name] = [value]
    _say(found, rollout_id)


def _speaks() -> bool:
    """Whether this rank is the first of those that share the figures: the last pipeline stage's ranks."""
    import torch.distributed as dist
    from megatron.core import mpu

    if not dist.is_initialized():
        return True
    first = mpu.get_data_parallel_rank(with_context_parallel=True) == 0
    return first and mpu.get_tensor_model_parallel_rank() == 0


def _say(found: Mismatch, rollout_id: int) -> None:
    run.say(
        f"rollout {rollout_id}: train/rollout KL {found.train_rollout_kl:.3e}, "
        "log-probability difference mean "
        f"{found.train_rollout_logprob_abs_diff:.3e} max {found.train_rollout_logprob_max_diff:.3e}",
        here=_speaks(),
    )
