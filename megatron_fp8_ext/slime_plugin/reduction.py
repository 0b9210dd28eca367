"""The gradient scale of slime's loss under `--calculate-per-token-loss`, right at every commit.

Megatron sums such a loss over micro-batches and ranks and divides once, by the tokens of the global batch,
counted by every context-parallel rank. The loss must therefore come back multiplied by cp and by nothing
else. Up to #987 (2025-12-01) slime multiplied by num_microbatches * dp * cp / global_batch_size in this mode
too, so that under dynamic batching the gradient changed its scale from step to step. And at every commit a
sample whose mask is empty counts as one token.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from types import ModuleType
from typing import Any

from megatron_fp8_ext.errors import UserError

_LOSS = "slime.backends.megatron_utils.loss"
_USERS = (_LOSS, "slime.backends.megatron_utils.model")
_MARK = "_megatron_fp8_ext"


def install() -> list[str]:
    """Wrap slime's `loss_function` where it is used; returns the names of the replaced symbols."""
    loss = importlib.import_module(_LOSS)
    wrapped = wrap(loss)
    done = []
    for name in _USERS:
        module = importlib.import_module(name)
        if hasattr(module, "loss_function"):
            module.loss_function = wrapped  # type: ignore[attr-defined]
            done.append(f"{name.removeprefix('slime.backends.')}.loss_function")
    return done


def installed() -> bool:
    """Whether `install` ran in this process."""
    loss = importlib.import_module(_LOSS)
    return hasattr(loss.loss_function, _MARK)


def wrap(loss: ModuleType) -> Any:
    """Return slime's `loss_function` with the scale and the token count mended.

    Args:
        loss: the module `slime.backends.megatron_utils.loss` of either commit.

    Raises:
        UserError: its `loss_function` has a signature of neither.
    """
    native = loss.loss_function
    if hasattr(native, _MARK):
        return native
    names = list(inspect.signature(native).parameters)
    per_step_batch = "step_global_batch_size" in names
    expected = ["args", "batch", "num_microbatches", "step_global_batch_size", "logits"]
    if names != [n for n in expected if per_step_batch or n != "step_global_batch_size"]:
        raise UserError(
            f"this slime's loss_function({', '.join(names)}) is unknown: its gradient scale "
            "cannot be checked; "
            "use slime 8359c9a or v0.3.x"
        )

    @functools.wraps(native)
    def loss_function(args: Any, batch: Any, num_microbatches: int, *rest: Any) -> Any:
        scaled, normalizer, report = native(args, batch, num_microbatches, *rest)
        if not args.calculate_per_token_loss:
            return scaled, normalizer, report
        if not per_step_batch:
            dp_cp = loss.mpu.get_data_parallel_world_size(with_context_parallel=True)
            cp = loss.mpu.get_context_parallel_world_size()
            scaled = scaled * (cp * args.global_batch_size / (num_microbatches * dp_cp))
        counted = sum(mask.sum() for mask in batch["loss_masks"])
        # A step without any response token then reports 0, not a division by zero.
        report["values"][0] = counted.clamp_min(0).to(report["values"].dtype) + _TINY
        return scaled, counted.to(normalizer.dtype), report

    setattr(loss_function, _MARK, True)
    return loss_function


_TINY = 1e-30
