"""WSD (warmup, stable, decay) as a pure function of samples, identical to Megatron's.

Megatron counts in samples: one iteration is `global_batch_size` of them. Tests hold this file to
`megatron.core.optimizer_param_scheduler.OptimizerParamScheduler`, step for step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megatron_fp8_ext.errors import UserError

DecayStyle = Literal["cosine", "linear", "exponential", "minus_sqrt"]


@dataclass(frozen=True, kw_only=True)
class WSD:
    """Warmup to `lr`, hold it, decay to `min_lr` over the last `decay_samples`.

    Attributes:
        lr: the stable learning rate.
        min_lr: learning rate at the end and after it.
        warmup_samples: length of the linear warmup.
        total_samples: end of the decay.
        decay_samples: length of the decay.
        decay_style: as Megatron's `--lr-wsd-decay-style`.
        init_lr: learning rate at sample 0.
    """

    lr: float
    min_lr: float
    warmup_samples: int
    total_samples: int
    decay_samples: int
    decay_style: DecayStyle = "cosine"
    init_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.decay_samples > self.total_samples - self.warmup_samples:
            raise UserError(
                f"the decay of {self.decay_samples} samples begins inside the warmup of "
                f"{self.warmup_samples} (of {self.total_samples} in all): shorten one of the two"
            )

    @property
    def decay_start(self) -> int:
        """First sample of the decay."""
        return self.total_samples - self.decay_samples

    def at(self, samples: int) -> float:
        """Return the learning rate after `samples` consumed samples."""
        if self.warmup_samples > 0 and samples <= self.warmup_samples:
            return self.init_lr + (self.lr - self.init_lr) * samples / self.warmup_samples
        if samples > self.total_samples:
            return self.min_lr
        if samples <= self.decay_start:
            return self.lr
        ratio = (samples - self.decay_start) / self.decay_samples
        return self.min_lr + _COEFFICIENT[self.decay_style](ratio) * (self.lr - self.min_lr)


_COEFFICIENT: dict[DecayStyle, Callable[[float], float]] = {
    "linear": lambda r: 1.0 - r,
    "cosine": lambda r: 0.5 * (math.cos(math.pi * r) + 1.0),
    "exponential": lambda r: 2.0 * 0.5**r - 1.0,
    "minus_sqrt": lambda r: 1.0 - math.sqrt(r),
}
