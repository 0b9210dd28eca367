"""What a cast costs in accuracy: SQNR, underflow and saturation of one operand of one GEMM."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fp8_ext.fp8 import casts
from megatron_fp8_ext.recipe import Cast, ScaleFormat


@dataclass(frozen=True)
class CastError:
    """The error of a cast.

    Attributes:
        sqnr_db: signal to quantization noise, `10 log10(sum x^2 / sum (x - q)^2)`; inf where exact,
            -inf where nothing is left of a signal.
        underflow: share of the values other than zero that became zero.
        saturation: share of the values clipped to the largest code.
        amax: largest magnitude.
    """

    sqnr_db: float
    underflow: float
    saturation: float
    amax: float


def sums(x_MK: Tensor, cast: Cast, scale_format: ScaleFormat) -> Tensor:
    """Return `[6]` float64 on the device of `x_MK`: what `summarise` needs, without a host sync.

    Args:
        x_MK: `[M, K]` bfloat16 or float32.
        cast: how it is cast.
        scale_format: how its scales are stored.
    """
    quantized = casts.quantize(x_MK, cast, scale_format)
    block_m, block_k = quantized.block
    grid_m, grid_k = quantized.scale_inv.shape

    def blocks(values: Tensor) -> Tensor:
        """By block, in FP32; zeros around a partial one count nowhere below."""
        rows, cols = values.shape
        padding = (0, grid_k * block_k - cols, 0, grid_m * block_m - rows)
        padded = torch.nn.functional.pad(values.to(torch.float32), padding)
        return padded.view(grid_m, block_m, grid_k, block_k)

    x, scale_inv = blocks(x_MK), quantized.scale_inv[:, None, :, None]
    q = blocks(quantized.codes) * scale_inv
    magnitude, flushed = x.abs(), q == 0
    parts = (
        x.square().sum(dtype=torch.float64),
        (x - q).square().sum(dtype=torch.float64),
        x.count_nonzero().to(torch.float64),
        flushed.logical_and(x).sum(dtype=torch.float64),
        (magnitude > scale_inv * casts.CLIPPED_FROM[cast.dtype]).sum(dtype=torch.float64)
        / x_MK.numel(),
        magnitude.amax().to(torch.float64),
    )
    return torch.stack(parts)


def summarise(values: Tensor) -> CastError:
    """Turn the result of `sums` into an error (this one waits for the device)."""
    signal, noise, nonzero, flushed, saturation, amax = values.tolist()
    if noise == 0:
        quality = math.inf
    else:
        quality = 10 * math.log10(signal / noise) if signal > 0 else -math.inf
    return CastError(quality, flushed / nonzero if nonzero else 0.0, saturation, amax)


def cast_error(x_MK: Tensor, cast: Cast, scale_format: ScaleFormat) -> CastError:
    """Return the error of casting `x_MK` `[M, K]`."""
    return summarise(sums(x_MK, cast, scale_format))
