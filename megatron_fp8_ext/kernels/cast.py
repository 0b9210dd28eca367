"""Casts to block-scaled E4M3 in one pass: 1x128 along rows, along columns or both, and 128x128.

Layouts are those of TransformerEngine's `Float8BlockwiseQTensor` (2.4 to 2.20), for a matrix x of
M rows and K columns, with ceil4(n) = n rounded up to a multiple of 4:

    cast           codes            scale_inv
    1x128 rows     [M, K] uint8     [ceil(K/128), ceil4(M)] FP32
    1x128 columns  [K, M] uint8     [ceil(M/128), ceil4(K)] FP32
    128x128 rows   [M, K] uint8     [ceil(M/128), ceil4(ceil(K/128))] FP32
    128x128 cols   [K, M] uint8     [ceil(K/128), ceil4(ceil(M/128))] FP32

so that the scales of neighbouring rows of a GEMM operand are neighbours in memory. Entries that only
pad are zero. `rows` is the operand of fprop and dgrad, `columns` that of wgrad (and of dgrad, for a weight).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_fp8_ext.fp8.reference import BLOCK, Quantized
from megatron_fp8_ext.kernels import hopper, main_grad
from megatron_fp8_ext.recipe import ScaleFormat

_E4M3_MAX = tl.constexpr(448.0)
TILE = tl.constexpr(128)
WARPS = 8
# Where one direction alone is written: few registers, so that many warps hide the memory's latency.
ONE_WAY_WARPS = 16


class Operand(NamedTuple):
    """One GEMM operand in TransformerEngine's layout (see the module's table)."""

    codes: Tensor
    scale_inv: Tensor


class BlockCast(NamedTuple):
    """What a cast wrote; a direction that was not asked for is None.

    Attributes:
        rows: codes `[M, K]`, blocks along K.
        columns: codes `[K, M]`, blocks along M.
        square: whether the blocks are 128x128.
    """

    rows: Operand | None
    columns: Operand | None
    square: bool = False

    def quantized(self, columns: bool = False) -> Quantized:
        """Return one direction as the specification writes it: E4M3 dtype, scales not transposed."""
        operand = self.columns if columns else self.rows
        if operand is None:
            raise ValueError(f"the cast has no {'columns' if columns else 'rows'}")
        outer, inner = operand.codes.shape
        scales = operand.scale_inv if self.square else operand.scale_inv.t()
        grid = (-(-outer // BLOCK) if self.square else outer, -(-inner // BLOCK))
        return Quantized(
            operand.codes.view(torch.float8_e4m3fn),
            scales[: grid[0], : grid[1]].contiguous(),
            (BLOCK if self.square else 1, BLOCK),
        )


@triton.jit
def scale_of(amax, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr):  # type: ignore[no-untyped-def]
    """(multiplier, its inverse) of blocks: `reference.scale_from_amax`, bit for bit.

    Powers of two need no division. With amax = f 2^e, 1 <= f < 2, the exponent of 448 / amax is 8 - e
    where f <= 1.75 and 7 - e above; adding 0x1FFFFF to the bits carries exactly where f > 1.75.
    """
    if POWER_OF_TWO:
        exponent = (amax.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23
        biased = tl.minimum(262 - exponent, 254)
        scale = (biased << 23).to(tl.float32, bitcast=True)
        # 2^-127, the inverse of the largest power, is subnormal.
        inverse = tl.where(biased == 254, 0x00400000, (254 - biased) << 23)
        inverse = inverse.to(tl.float32, bitcast=True)
    else:
        scale = tl.div_rn(tl.zeros_like(amax) + _E4M3_MAX, amax)
        scale = tl.where(scale == float("inf"), LARGEST, scale)
        inverse = tl.div_rn(tl.zeros_like(amax) + 1.0, scale)
    neutral = (amax == 0) | (amax == float("inf"))
    return tl.where(neutral, 1.0, scale), tl.where(neutral, 1.0, inverse)


@triton.jit
def magnitude(x):  # type: ignore[no-untyped-def]
    """|x|, with NaN as zero: it must not take its neighbours' scale with it."""
    return tl.where(x == x, tl.abs(x), 0.0)


@triton.jit
def encode(scaled):  # type: ignore[no-untyped-def]
    """E4M3 bits: saturating, round to nearest even, NaN as 0x7F (cvt.rn.satfinite.e4m3x2)."""
    return scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def store_tile(  # type: ignore[no-untyped-def]
    x, tile_m, tile_k, M, K,
    row_codes, row_scales, row_stride,
    col_codes, col_scales, col_stride,
    LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, SQUARE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Cast the FP32 tile `[128, 128]` at (tile_m, tile_k) of a matrix `[M, K]`; zeros outside of it.

    row_stride and col_stride are those of the scales' first dimension. WHOLE promises that no tile is
    partial.
    """
    m = tile_m * TILE + tl.arange(0, TILE)
    k = tile_k * TILE + tl.arange(0, TILE)
    inside = (m < M)[:, None] & (k < K)[None, :]
    size = magnitude(x)
    if SQUARE:
        scale, inverse = scale_of(tl.max(tl.max(size, axis=1), axis=0), LARGEST, POWER_OF_TWO)
        codes = encode(x * scale)
        if ROWS:
            at = m.to(tl.int64)[:, None] * K + k[None, :]
            if WHOLE:
                tl.store(row_codes + at, codes)
            else:
                tl.store(row_codes + at, codes, mask=inside)
            tl.store(row_scales + tile_m * row_stride + tile_k, inverse)
        if COLUMNS:
            at = k.to(tl.int64)[None, :] * M + m[:, None]
            if WHOLE:
                tl.store(col_codes + at, codes)
            else:
                tl.store(col_codes + at, codes, mask=inside)
            tl.store(col_scales + tile_k * col_stride + tile_m, inverse)
    else:
        if ROWS:
            scale, inverse = scale_of(tl.max(size, axis=1), LARGEST, POWER_OF_TWO)
            codes = encode(x * scale[:, None])
            at = m.to(tl.int64)[:, None] * K + k[None, :]
            if WHOLE:
                tl.store(row_codes + at, codes)
                tl.store(row_scales + tile_k * row_stride + m, inverse)
            else:
                tl.store(row_codes + at, codes, mask=inside)
                tl.store(row_scales + tile_k * row_stride + m, inverse, mask=m < M)
        if COLUMNS:
            scale, inverse = scale_of(tl.max(size, axis=0), LARGEST, POWER_OF_TWO)
            codes = encode(x * scale[None, :])
            at = k.to(tl.int64)[None, :] * M + m[:, None]
            if WHOLE:
                tl.store(col_codes + at, codes)
                tl.store(col_scales + tile_m * col_stride + k, inverse)
            else:
                tl.store(col_codes + at, codes, mask=inside)
                tl.store(col_scales + tile_m * col_stride + k, inverse, mask=k < K)


@triton.jit
def load_tile(pointer, tile_m, tile_k, M, K, stride, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tile `[128, 128]` of a matrix `[M, K]` with row stride `stride` in FP32, zeros outside."""
    m = tile_m * TILE + tl.arange(0, TILE)
    k = tile_k * TILE + tl.arange(0, TILE)
    at = m.to(tl.int64)[:, None] * stride + k[None, :]
    if WHOLE:
        x = tl.load(pointer + at)
    else:
        x = tl.load(pointer + at, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
    return x.to(tl.float32)


@triton.jit
def _cast_kernel(  # type: ignore[no-untyped-def]
    x, row_codes, row_scales, col_codes, col_scales, M, K, row_stride, col_stride,
    LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, SQUARE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    tile_k, tile_m = tl.program_id(0), tl.program_id(1)
    tile = load_tile(x, tile_m, tile_k, M, K, K, WHOLE)
    store_tile(
        tile, tile_m, tile_k, M, K,
        row_codes, row_scales, row_stride, col_codes, col_scales, col_stride,
        LARGEST, POWER_OF_TWO, SQUARE, ROWS, COLUMNS, WHOLE,
    )  # fmt: skip


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _scales(shape: tuple[int, int], used: tuple[int, int], device: torch.device) -> Tensor:
    make = torch.empty if shape == used else torch.zeros
    return make(shape, dtype=torch.float32, device=device)


def allocate(
    rows: int, columns: int, device: torch.device, want: tuple[bool, bool], square: bool = False
) -> BlockCast:
    """Return uninitialized operands for a matrix `[rows, columns]`; `want` is (rows, columns)."""

    def operand(outer: int, inner: int) -> Operand:
        codes = torch.empty((outer, inner), dtype=torch.uint8, device=device)
        blocks = -(-inner // BLOCK)
        used = (-(-outer // BLOCK), blocks) if square else (blocks, outer)
        return Operand(codes, _scales((used[0], _round_up(used[1], 4)), used, device))

    return BlockCast(
        operand(rows, columns) if want[0] else None,
        operand(columns, rows) if want[1] else None,
        square,
    )


def pointers(cast: BlockCast, filler: Tensor) -> tuple[Any, ...]:
    """(row codes, row scales, column codes, column scales, row stride, column stride) for a kernel.

    A direction that is not wanted gets `filler` (any tensor): the kernel never touches it.
    """
    rows, columns = cast.rows or Operand(filler, filler), cast.columns or Operand(filler, filler)
    strides = (rows.scale_inv.stride(0), columns.scale_inv.stride(0))
    return (rows.codes, rows.scale_inv, columns.codes, columns.scale_inv, *strides)


def constants(
    cast: BlockCast, scale_format: ScaleFormat, dtype: torch.dtype, whole: bool
) -> dict[str, Any]:
    """The compile-time arguments that every kernel with `store_tile` takes."""
    return {
        "LARGEST": float(torch.finfo(dtype).max),
        "POWER_OF_TWO": scale_format == "power_of_two",
        "ROWS": cast.rows is not None,
        "COLUMNS": cast.columns is not None,
        "WHOLE": whole,
    }


def registers(warps: int) -> dict[str, int]:
    """Compile-time limit for tiles in both directions: at 16 warps two programs on a multiprocessor.

    Compiled for sm_90 by Triton 3.6 that spills 16 bytes of a thread in the cast of both directions.
    """
    return {"maxnreg": 64} if warps == 16 else {}


def check_matrix(x: Tensor, what: str) -> tuple[int, int]:
    """Return the shape of a contiguous BF16 or FP32 matrix.

    Raises:
        ValueError: it is something else.
    """
    if x.dim() != 2 or x.dtype not in (torch.bfloat16, torch.float32) or not x.is_contiguous():
        raise ValueError(
            f"{what} must be a contiguous bf16 or fp32 matrix, "
            f"got {x.dtype} {tuple(x.shape)} with strides {x.stride()}"
        )
    return int(x.shape[0]), int(x.shape[1])


def cast_1x128(
    x: Tensor,
    scale_format: ScaleFormat,
    rows: bool = True,
    columns: bool = True,
    warps: int | None = None,
) -> BlockCast:
    """Cast activations or gradients, in one read of `x`.

    Args:
        x: `[M, K]` bfloat16 or float32, contiguous; any M and K.
        scale_format: `power_of_two` or `float32`.
        rows: whether the row-wise operand is wanted.
        columns: whether the column-wise (transposed) operand is wanted.
        warps: of Triton's program for a 128x128 tile; None for what was found best (`hopper`, or Triton).

    Raises:
        ValueError: `x` is not such a matrix, or neither direction is wanted.
    """
    if warps is None:
        if x.dim() == 2 and hopper.takes(x, *x.shape) and (rows or columns):
            m, k = check_matrix(x, "the tensor to cast")
            out = allocate(m, k, x.device, (rows, columns))
            hopper.run("plain", (m, k), out, scale_format == "power_of_two", x)
            return out
        warps = WARPS if rows and columns else ONE_WAY_WARPS
    return _cast(x, scale_format, (rows, columns), False, warps)


def cast_1x128_and_sum(
    x: Tensor,
    scale_format: ScaleFormat,
    dtype: torch.dtype = torch.float32,
    add_to: Tensor | None = None,
) -> tuple[BlockCast, Tensor]:
    """Cast a gradient in both directions, and sum its columns in the same read: a bias's gradient.

    Args:
        x: `[M, K]` as for `cast_1x128`.
        scale_format: likewise.
        dtype: of the sums, BF16 or FP32; they are made in FP32.
        add_to: `[K]` BF16 or FP32, where they are added in place of a new tensor.

    Returns:
        (both operands, `[K]`).
    """
    if x.dim() != 2 or not hopper.takes(x, *x.shape):
        total = x.sum(dim=0, dtype=torch.float32)
        return cast_1x128(x, scale_format), main_grad.put(total, dtype, add_to)
    m, k = check_matrix(x, "the tensor to cast")
    out = allocate(m, k, x.device, (True, True))
    totals = torch.empty((m // BLOCK, k), dtype=torch.float32, device=x.device)
    hopper.run("plain", (m, k), out, scale_format == "power_of_two", x, totals=totals)
    return out, hopper.sum_of_parts(totals, dtype, add_to)


def cast_128x128(
    weight: Tensor,
    scale_format: ScaleFormat,
    rows: bool = True,
    columns: bool = True,
    warps: int = WARPS,
) -> BlockCast:
    """Cast a weight `[N, K]`: one set of codes, as it is (fprop) and transposed (dgrad).

    BF16 alone: training rounds its FP32 main weights to BF16 before it casts them, and compiled for
    an H200 this kernel does not equal the specification on FP32 input (docs/performance.md).

    Raises:
        ValueError: the weight is not a contiguous BF16 matrix, or neither use is wanted.
    """
    if weight.dtype != torch.bfloat16:
        raise ValueError(f"weights are cast from bf16, as training casts them, not {weight.dtype}")
    return _cast(weight, scale_format, (rows, columns), True, warps)


def _cast(
    x: Tensor, scale_format: ScaleFormat, want: tuple[bool, bool], square: bool, warps: int
) -> BlockCast:
    m, k = check_matrix(x, "the tensor to cast")
    if not any(want):
        raise ValueError("a cast needs rows, columns or both")
    out = allocate(m, k, x.device, want, square)
    if m == 0 or k == 0:
        return out
    grid = (triton.cdiv(k, BLOCK), triton.cdiv(m, BLOCK))
    *operands, row_stride, col_stride = pointers(out, x)
    _cast_kernel[grid](
        x, *operands, m, k, row_stride, col_stride,
        SQUARE=square,
        **constants(out, scale_format, x.dtype, m % BLOCK == 0 and k % BLOCK == 0),
        **registers(warps),
        num_warps=warps,
    )  # fmt: skip
    return out
