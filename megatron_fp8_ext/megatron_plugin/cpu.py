"""What Megatron itself needs to train without a GPU; `cpu_torch` does torch's part.

Used only where torch sees no GPU. Every function here is the `apply` of one record in `patches`.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch


def hide_transformer_engine() -> None:
    """Make `import transformer_engine` an ImportError.

    Without libcuda it raises OSError or RuntimeError, and Megatron catches only ImportError.
    """
    if not isinstance(sys.modules.get("transformer_engine"), ModuleType):
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]


def allow_no_cuda(module: ModuleType) -> None:
    """`initialize_megatron(allow_no_cuda=True)`: Megatron's own switch, which pretrain never sets."""
    module.initialize_megatron = functools.partial(  # type: ignore[attr-defined]
        module.initialize_megatron, allow_no_cuda=True
    )


def rng_tracker_on_cpu(module: ModuleType) -> None:
    """The tracker of tensor-parallel random states works on torch's CPU generator."""

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    # Megatron warns at each weight that the CPU's state moved; here it is the one that has to.
    logging.getLogger(module.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    module._get_cuda_rng_state = get_state  # type: ignore[attr-defined]
    module._set_cuda_rng_state = set_state  # type: ignore[attr-defined]


def data_apart_from_dropout(module: ModuleType) -> None:
    """Building the data leaves the random state as it was.

    A data loader draws a seed from the CPU's generator, and does so after a checkpoint has restored
    that. On a GPU dropout has a generator of its own; here it is the same one, and a resumed run
    would drop other values than the uninterrupted one.
    """
    original = module.build_train_valid_test_data_iterators

    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        state = torch.get_rng_state()
        try:
            return original(*args, **kwargs)
        finally:
            torch.set_rng_state(state)

    module.build_train_valid_test_data_iterators = build  # type: ignore[attr-defined]


def norm_under_sequence_parallel(module: ModuleType) -> None:
    """torch's norm, marked so that its gradient is summed over the tensor-parallel ranks.

    The local norm refuses sequence parallel only because nobody sets that mark.
    """
    original = module.WrappedTorchNorm

    class WrappedTorchNorm(original):  # type: ignore[misc, valid-type]
        def __new__(cls, config: Any, *args: Any, **kwargs: Any) -> Any:
            sequence_parallel, config.sequence_parallel = config.sequence_parallel, False
            try:
                norm = original.__new__(original, config, *args, **kwargs)
            finally:
                config.sequence_parallel = sequence_parallel
            for parameter in norm.parameters():
                parameter.sequence_parallel = sequence_parallel
            return norm

    module.WrappedTorchNorm = WrappedTorchNorm  # type: ignore[attr-defined]


class FusedAdam(torch.optim.AdamW):
    """AdamW that keeps `step` in its parameter groups, as TE's and Apex's FusedAdam do.

    Megatron's distributed optimizer saves and restores it from there; torch's own keeps it for each
    parameter and cannot be resumed ("assert len(steps) == 1").
    """

    def __init__(self, params: Iterable[Any], **kwargs: Any) -> None:
        known = ("lr", "betas", "eps", "weight_decay")
        super().__init__(params, **{key: kwargs[key] for key in known if key in kwargs})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As any optimizer's: AdamW's own looks for a `step` of each parameter."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One AdamW step in FP32; the arithmetic is torch's own functional AdamW."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                state = self.state[p]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
            beta1, beta2 = group["betas"]
            torch.optim._functional.adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                # adamw adds one itself.
                [torch.tensor(float(group["step"] - 1)) for _ in params],
                foreach=False,
                capturable=False,
                differentiable=False,
                fused=False,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def adam_in_optimizer(module: ModuleType) -> None:
    """`megatron.core.optimizer` builds our FusedAdam."""
    module.Adam = FusedAdam  # type: ignore[attr-defined]
    module.USING_PYTORCH_OPTIMIZER = False  # type: ignore[attr-defined]


def adam_in_distributed_optimizer(module: ModuleType) -> None:
    """The distributed optimizer treats it as it treats Apex's: `step` lives in the groups."""
    module.Adam = FusedAdam  # type: ignore[attr-defined]
    module.HAVE_APEX_OR_TE = True  # type: ignore[attr-defined]
    module.USING_APEX_OPTIMIZER = True  # type: ignore[attr-defined]


def recompute_without_te(module: ModuleType) -> None:
    """Full recomputation under FP8 calls TransformerEngine's checkpoint; Megatron's own does here.

    The recomputed layers enter the FP8 context themselves, so they are emulated again.
    """

    def te_checkpoint(
        forward: Any, distribute_saved_activations: bool, rng_tracker: Any, group: Any, *args: Any
    ) -> Any:
        from megatron.core import tensor_parallel

        return tensor_parallel.checkpoint(forward, distribute_saved_activations, *args)

    module.te_checkpoint = te_checkpoint  # type: ignore[attr-defined]
