"""The specification of the block-scaled E4M3 cast, in plain PyTorch on any device.

Every other cast (TransformerEngine's, and later ours in Triton) must agree with this file bit for
bit, in codes and in scales; tests/gpu/test_te_agrees.py holds TransformerEngine to it.

Names: x_MK is a matrix of M rows and K columns; s_mk is its grid of scales, one per block.

    amax      = max |x| over the block, NaN ignored
    scale     = 448 / amax                       rounded to FP32 once
    scale     = largest finite value of x's type where 448 / amax overflows FP32
    scale     = exponent bits of scale           (power_of_two only: the mantissa is cut off)
    scale     = 1                                where amax is 0 or inf
    code      = e4m3(clamp(x * scale, -448, 448))   round to nearest even
    scale_inv = 1 / scale                        what is stored and what dequantizes

Cutting the mantissa of the multiplier rounds it down, so no value can overflow E4M3. It works on
the bits because log2 in floating point is wrong next to exact powers of two. This follows
TransformerEngine, common/recipe/recipe_common.cuh (compute_scale_from_amax).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fp8_ext.recipe import ScaleFormat

BLOCK = 128
E4M3_MAX = 448.0
_EXPONENT_BITS = 0xFF800000 - (1 << 32)  # sign and exponent of an FP32, as a signed int32
_E4M3_NAN = 0x7F


class Quantized(NamedTuple):
    """A block-scaled tensor.

    Attributes:
        codes: `[M, K]` float8_e4m3fn.
        scale_inv: `[ceil(M / block_m), ceil(K / block_k)]` float32; multiply codes by it.
        block: `(block_m, block_k)`.
    """

    codes: Tensor
    scale_inv: Tensor
    block: tuple[int, int]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return `[M, K]` of `dtype`; exact in BF16 where the scales are powers of two."""
        rows, cols = self.codes.shape
        block_m, block_k = self.block
        grid_m, grid_k = self.scale_inv.shape
        values = self.codes.to(torch.float32)
        values = _pad(values, grid_m * block_m, grid_k * block_k)
        values = values.view(grid_m, block_m, grid_k, block_k) * self.scale_inv[:, None, :, None]
        return values.view(grid_m * block_m, grid_k * block_k)[:rows, :cols].to(dtype)


def _pad(x: Tensor, rows: int, cols: int) -> Tensor:
    """Pad with zeros, which never change a block's amax."""
    if tuple(x.shape) == (rows, cols):
        return x.contiguous()
    return torch.nn.functional.pad(x, (0, cols - x.shape[1], 0, rows - x.shape[0]))


def scale_from_amax(
    amax: Tensor, scale_format: ScaleFormat, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Return the FP32 multiplier for blocks with the given FP32 `amax` (same shape).

    `dtype` is that of the tensor being cast: its largest finite value bounds the multiplier, which
    shows only where amax is below 2^-119.
    """
    scale = torch.full_like(amax, E4M3_MAX) / amax
    largest = torch.full_like(scale, torch.finfo(dtype).max)
    scale = torch.where(torch.isinf(scale), largest, scale)
    if scale_format == "power_of_two":
        scale = (scale.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    neutral = (amax == 0) | torch.isinf(amax) | torch.isnan(amax)
    return torch.where(neutral, torch.ones_like(scale), scale)


def quantize(x_MK: Tensor, block: tuple[int, int], scale_format: ScaleFormat) -> Quantized:
    """Cast a matrix to block-scaled E4M3.

    Args:
        x_MK: `[M, K]` bfloat16 or float32; any M and K, partial blocks included.
        block: `(1, 128)` or `(128, 128)`.
        scale_format: `power_of_two` or `float32`.

    Raises:
        ValueError: not a matrix, or a dtype other than bfloat16 and float32.
    """
    if x_MK.dim() != 2 or x_MK.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"expected a bf16 or fp32 matrix, got {x_MK.dtype} {tuple(x_MK.shape)}")
    rows, cols = x_MK.shape
    block_m, block_k = block
    grid_m, grid_k = -(-rows // block_m), -(-cols // block_k)
    x = _pad(x_MK.to(torch.float32), grid_m * block_m, grid_k * block_k)
    x = x.view(grid_m, block_m, grid_k, block_k)
    # CUDA's fmaxf drops NaN, so a NaN does not take its neighbours' scale with it.
    amax = x.abs().amax(dim=(1, 3))
    if _may_hold_nan(amax):
        amax = torch.nan_to_num(x.abs(), nan=0.0, posinf=torch.inf).amax(dim=(1, 3))
    scale = scale_from_amax(amax, scale_format, x_MK.dtype)
    codes = _to_e4m3(x * scale[:, None, :, None])
    codes = codes.view(grid_m * block_m, grid_k * block_k)[:rows, :cols].contiguous()
    return Quantized(codes, scale.reciprocal(), block)


def _may_hold_nan(x: Tensor) -> bool:
    """Whether NaN must be provided for; on a GPU always, for looking would wait for it."""
    return x.is_cuda or bool(torch.isnan(x).any())


def _to_e4m3(scaled: Tensor) -> Tensor:
    """Saturating round-to-nearest-even cast; NaN becomes the positive NaN code, as on the GPU."""
    codes = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    if _may_hold_nan(scaled):
        nan = torch.isnan(scaled)
        codes = codes.view(torch.uint8).masked_fill(nan, _E4M3_NAN).view(torch.float8_e4m3fn)
    return codes


def quantize_rows(x_MK: Tensor, scale_format: ScaleFormat) -> Quantized:
    """1x128 along K: the operand of fprop (input) and dgrad (gradient)."""
    return quantize(x_MK, (1, BLOCK), scale_format)


def quantize_columns(x_MK: Tensor, scale_format: ScaleFormat) -> Quantized:
    """1x128 along M, returned transposed as `[K, M]`: the operands of wgrad.

    Cast anew from high precision: a tensor with 1x128 scales cannot be transposed.
    """
    return quantize(x_MK.t().contiguous(), (1, BLOCK), scale_format)


def quantize_weight(w_NK: Tensor, scale_format: ScaleFormat) -> Quantized:
    """128x128: one set of codes serves fprop and, transposed, dgrad."""
    return quantize(w_NK, (BLOCK, BLOCK), scale_format)
