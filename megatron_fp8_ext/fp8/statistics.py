"""What a cast costs in accuracy: SQNR, underflow and saturation of one operand of one GEMM."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

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
    return sums_of_each(x_MK[None], cast, scale_format)[0]


def sums_of_each(x_BMK: Tensor, cast: Cast, scale_format: ScaleFormat) -> Tensor:
    """Return `[B, 6]`, the `sums` of each of B matrices of one shape, for little more than one's cost.

    Matrices whose blocks end where they end are cast as one, below each other; others one by one.
    """
    count, rows, cols = x_BMK.shape
    if cast.block == "tensor":
        cast = replace(cast, block=(rows, cols))
    elif rows % cast.block[0] and count > 1:
        return torch.cat([sums_of_each(x[None], cast, scale_format) for x in x_BMK])
    quantized = casts.quantize(x_BMK.reshape(count * rows, cols), cast, scale_format)
    block_m, block_k = quantized.block
    grid_m, grid_k = quantized.scale_inv.shape

    def blocks(values: Tensor) -> Tensor:
        """By matrix and block, in FP32; zeros around a partial one count nowhere below."""
        padding = (0, grid_k * block_k - cols, 0, grid_m * block_m - values.shape[0])
        padded = torch.nn.functional.pad(values.to(torch.float32), padding)
        return padded.view(count, grid_m // count, block_m, grid_k, block_k)

    x = blocks(x_BMK.reshape(count * rows, cols))
    scale_inv = quantized.scale_inv.view(count, grid_m // count, 1, grid_k, 1)
    q = blocks(quantized.codes) * scale_inv
    magnitude = x.abs()

    def total(values: Tensor) -> Tensor:
        return values.flatten(1).sum(1, dtype=torch.float64)

    parts = (
        total(x.square()),
        total((x - q).square()),
        total(x != 0),
        total((q == 0).logical_and(x)),
        total(magnitude > scale_inv * casts.CLIPPED_FROM[cast.dtype]) / (rows * cols),
        magnitude.flatten(1).amax(1).to(torch.float64),
    )
    return torch.stack(parts, 1)


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
