"""Any `recipe.Cast` of a matrix: the recipe's own through `reference`, the others for comparison.

The others are what a negative control trains with, and what Megatron's per-tensor recipes cast with
(fp8/statistics.py measures their error). No hardware path is held to them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fp8_ext.fp8 import reference
from megatron_fp8_ext.fp8.reference import Quantized
from megatron_fp8_ext.recipe import INFIR2, Cast, FP8Recipe, ScaleFormat

# Largest value of each format (E4M3 as OCP's, without infinities).
MAXIMUM = {"e4m3": 448.0, "e5m2": 57344.0, "e4m1": 384.0}
# From here on a value would round to a code above the largest: half a spacing beyond it.
CLIPPED_FROM = {"e4m3": 464.0, "e5m2": 61440.0, "e4m1": 448.0}
_SMALLEST_NORMAL_E4 = 2.0**-6


class Casts(NamedTuple):
    """The casts of the three operands, and how their scales are stored."""

    input: Cast
    weight: Cast
    grad_output: Cast
    scale_format: ScaleFormat


def of_recipe(recipe: FP8Recipe) -> Casts:
    """Return the casts of an FP8 recipe.

    Raises:
        ValueError: the recipe casts nothing.
    """
    if recipe.input is None or recipe.weight is None or recipe.grad_output is None:
        raise ValueError(f"recipe '{recipe.name}' casts nothing")
    return Casts(recipe.input, recipe.weight, recipe.grad_output, recipe.scale_format)


INFIR2_CASTS = of_recipe(INFIR2)


def quantize(x_MK: Tensor, cast: Cast, scale_format: ScaleFormat) -> Quantized:
    """Cast a bfloat16 or float32 matrix `[M, K]`; the codes are float8_e4m3fn or float8_e5m2.

    Raises:
        ValueError: not such a matrix.
    """
    if cast.dtype == "e4m3" and cast.scaled and cast.block != "tensor":
        return reference.quantize(x_MK, cast.block, scale_format)
    if x_MK.dim() != 2 or x_MK.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"expected a bf16 or fp32 matrix, got {x_MK.dtype} {tuple(x_MK.shape)}")
    rows, cols = x_MK.shape
    block_m, block_k = (rows, cols) if cast.block == "tensor" else cast.block
    grid_m, grid_k = -(-rows // block_m), -(-cols // block_k)
    padding = (0, grid_k * block_k - cols, 0, grid_m * block_m - rows)
    x = torch.nn.functional.pad(x_MK.to(torch.float32), padding)
    x = x.view(grid_m, block_m, grid_k, block_k)
    largest = MAXIMUM[cast.dtype]
    if cast.scaled:
        amax = x.abs().amax(dim=(1, 3))
        # scale_from_amax computes 448 / amax; the same rule for another maximum.
        scale = reference.scale_from_amax(
            amax * (reference.E4M3_MAX / largest), scale_format, x_MK.dtype
        )
    else:
        scale = torch.ones(grid_m, grid_k, device=x.device)
    scaled = (x * scale[:, None, :, None]).clamp(-largest, largest)
    scaled = scaled.view(grid_m * block_m, grid_k * block_k)[:rows, :cols]
    if cast.dtype == "e4m1":
        scaled = _round_to_one_bit(scaled)
    codes = scaled.to(torch.float8_e5m2 if cast.dtype == "e5m2" else torch.float8_e4m3fn)
    return Quantized(codes.contiguous(), scale.reciprocal(), (block_m, block_k))


def _round_to_one_bit(x: Tensor) -> Tensor:
    """Round to one mantissa bit above 2^-6, to multiples of 2^-7 below: exact in E4M3."""
    magnitude = x.abs().clamp_min(_SMALLEST_NORMAL_E4)
    exponent = torch.frexp(magnitude).exponent - 1
    spacing = torch.ldexp(torch.ones_like(x), exponent - 1)
    return torch.round(x / spacing) * spacing
