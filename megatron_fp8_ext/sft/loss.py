"""The InfiAlign SFT loss, and how any loss of ours is put together.

A loss is a pair of numbers for each predicted token, made where the samples are still whole: its weight in
the sum of losses, and its part in what that sum is divided by. Both sums run over the *global* batch (all
micro-batches, data- and context-parallel ranks), so neither the gradient nor the reported value depends
on how the batch was packed or split. Megatron does the second sum under `--calculate-per-token-loss`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # `megatron-fp8 list` loads this module without numpy
    from typing import TypeAlias

    import numpy as np
    import numpy.typing as npt
    import torch

    Weights: TypeAlias = npt.NDArray[np.float32]
    Units: TypeAlias = npt.NDArray[np.int64]


class SampleLoss(Protocol):
    """What the entry-point group `megatron_fp8_ext.losses` provides.

    Attributes:
        summary: one line for `megatron-fp8 list`.
    """

    summary: str

    def weigh(self, mask: npt.NDArray[np.bool_]) -> tuple[Weights, Units]:
        """Return (weights, units) `[n]` of one whole sample whose prediction targets are `mask`.

        The loss of the global batch is sum(weight * negative log-likelihood) / sum(units).
        """


class TokenMean:
    """Sum of response-token losses of the global batch / its number of response tokens."""

    summary = "InfiAlign: response-token losses of the global batch / its response tokens"

    def weigh(self, mask: npt.NDArray[np.bool_]) -> tuple[Weights, Units]:
        """Every response token weighs the same."""
        return mask.astype("float32"), mask.astype("int64")


class SampleMean:
    """Mean over the samples of the global batch of each sample's mean response-token loss."""

    summary = "mean over samples of each sample's mean response-token loss"

    def weigh(self, mask: npt.NDArray[np.bool_]) -> tuple[Weights, Units]:
        """Every sample with a response weighs the same; its last response token stands for it."""
        units = 0 * mask.astype("int64")
        count = int(mask.sum())
        if count:
            units[mask.nonzero()[0][-1]] = 1
        return (mask / max(count, 1)).astype("float32"), units


infialign = TokenMean()
sample_mean = SampleMean()


def reduce(
    token_losses: torch.Tensor, weights: torch.Tensor, units: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (weighted sum in FP32, number of units as int32) of one micro-batch.

    A token of weight 0 contributes exactly 0 to the sum, even where its loss is not finite; a micro-batch
    without response tokens gives (0, 0), with a zero gradient.

    Args:
        token_losses: negative log-likelihoods, any shape.
        weights: as many FP32 numbers.
        units: as many integers.
    """
    import torch

    flat = token_losses.float().reshape(-1)
    weights = weights.reshape(-1)
    total = torch.where(weights != 0, flat, 0.0).mul(weights).sum()
    return total, units.sum().to(torch.int32)
