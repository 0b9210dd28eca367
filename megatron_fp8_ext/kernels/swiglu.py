"""SwiGLU with the cast of its result, forward and backward, each in one pass.

x = [gate, up] is the output of fc1, `[M, 2F]`; y = silu(gate) * up, `[M, F]`, is the input of fc2.
Both are computed in FP32 and rounded to BF16 once, and that BF16 value is what is cast.
Per element of y the forward moves 4 + 2 bytes (unfused: 4 + 2, and 2 + 2 for the cast), the backward 6 + 4.

The backward can also write the column-wise operand of y, which fc2's wgrad needs: it reads x anyway, so
the forward then writes one byte less and nothing of y is kept (`y_columns`). And x itself can be kept in
8 bits (`stash.Stash`): the forward makes that with `stash`, the backward takes it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_fp8_ext.fp8.reference import BLOCK
from megatron_fp8_ext.kernels import cast, hopper
from megatron_fp8_ext.kernels import stash as stashes
from megatron_fp8_ext.kernels.cast import (
    ONE_WAY_WARPS,
    TILE,
    WARPS,
    BlockCast,
    load_tile,
    magnitude,
    store_tile,
)
from megatron_fp8_ext.kernels.stash import PER_TILE, SMALLEST_SCALE, Stash
from megatron_fp8_ext.recipe import ScaleFormat

BACKWARD_WARPS = 16
_PER_TILE = tl.constexpr(PER_TILE)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_INVERSE_127 = tl.constexpr(1 / 127)


@triton.jit
def _round(x):  # type: ignore[no-untyped-def]
    """FP32 values that BF16 can hold."""
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _keep(pointer, x, tile_m, tile_k, M, K):  # type: ignore[no-untyped-def]
    m = tile_m * TILE + tl.arange(0, TILE)
    k = tile_k * TILE + tl.arange(0, TILE)
    inside = (m < M)[:, None] & (k < K)[None, :]
    tl.store(pointer + m.to(tl.int64)[:, None] * K + k[None, :], x.to(tl.bfloat16), mask=inside)


@triton.jit
def _product(gate, up):  # type: ignore[no-untyped-def]
    """silu(gate) * up, rounded to BF16: the same in the forward and, computed again, in the backward."""
    return _round(gate / (1.0 + tl.exp(-gate)) * up)


@triton.jit
def _stash(x, tile_m, tile_k, M, K, codes, scales, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keep an FP32 tile of a matrix `[M, K]`, K a multiple of 128, as `stash.quantize` does."""
    m = tile_m * TILE + tl.arange(0, TILE)
    k = tile_k * TILE + tl.arange(0, TILE)
    blocks = tl.reshape(x, (TILE, _PER_TILE, TILE // _PER_TILE))
    amax = tl.max(magnitude(blocks), axis=2)
    broken = tl.max(((blocks != blocks) | (tl.abs(blocks) == float("inf"))).to(tl.int32), axis=2)
    scale = (amax * _INVERSE_127).to(tl.bfloat16).to(tl.float32)
    scale = tl.where(scale < _SMALLEST_SCALE, 0.0, scale)
    # To the nearest, ties to even: below 2^22 the sum with 1.5 2^23 has no bits after the point.
    inverse = tl.where(scale == 0.0, 0.0, tl.div_rn(tl.zeros_like(scale) + 1.0, scale))
    code = blocks * inverse[:, :, None] + 12582912.0 - 12582912.0
    code = tl.where((broken > 0)[:, :, None], 0.0, code)
    scale = tl.where(broken > 0, float("nan"), scale)
    code = tl.reshape(code.to(tl.int8), (TILE, TILE))
    at = m.to(tl.int64)[:, None] * K + k[None, :]
    block = (tile_k * M + m)[:, None] * _PER_TILE + tl.arange(0, _PER_TILE)[None, :]
    if WHOLE:
        tl.store(codes + at, code)
        tl.store(scales + block, scale.to(tl.bfloat16))
    else:
        tl.store(codes + at, code, mask=(m < M)[:, None])
        tl.store(scales + block, scale.to(tl.bfloat16), mask=(m < M)[:, None])


@triton.jit
def _unstash(codes, scales, tile_m, tile_k, M, K, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """FP32 tile of a matrix `[M, K]` that was kept by `_stash`."""
    m = tile_m * TILE + tl.arange(0, TILE)
    k = tl.arange(0, TILE)
    at = m.to(tl.int64)[:, None] * K + (tile_k * TILE + k)[None, :]
    block = (tile_k * M + m)[:, None] * _PER_TILE + (k // (TILE // _PER_TILE))[None, :]
    if WHOLE:
        code, scale = tl.load(codes + at), tl.load(scales + block)
    else:
        code = tl.load(codes + at, mask=(m < M)[:, None], other=0)
        scale = tl.load(scales + block, mask=(m < M)[:, None], other=0.0)
    return code.to(tl.float32) * scale.to(tl.float32)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x, row_codes, row_scales, col_codes, col_scales, stash_codes, stash_scales, kept,
    M, F, row_stride, col_stride,
    LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr, KEEP: tl.constexpr, STASH: tl.constexpr,
):  # fmt: skip
    tile_k, tile_m = tl.program_id(0), tl.program_id(1)
    gate = load_tile(x, tile_m, tile_k, M, F, 2 * F, WHOLE)
    up = load_tile(x + F, tile_m, tile_k, M, F, 2 * F, WHOLE)
    if STASH:
        for half in tl.static_range(2):
            _stash(
                gate if half == 0 else up, tile_m, tile_k + half * (F // TILE), M, 2 * F,
                stash_codes, stash_scales, WHOLE,
            )  # fmt: skip
    y = _product(gate, up)
    if KEEP:
        _keep(kept, y, tile_m, tile_k, M, F)
    store_tile(
        y, tile_m, tile_k, M, F,
        row_codes, row_scales, row_stride, col_codes, col_scales, col_stride,
        LARGEST, POWER_OF_TWO, False, ROWS, COLUMNS, WHOLE,
    )  # fmt: skip


@triton.jit
def _gradients(dy, gate, up):  # type: ignore[no-untyped-def]
    """(gradient of gate, gradient of up), rounded to BF16."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    return _round(dgate), _round(dy * gate * sigmoid)


@triton.jit
def _load_half(  # type: ignore[no-untyped-def]
    x, scales, half, tile_m, tile_k, M, F, STASH: tl.constexpr, WHOLE: tl.constexpr
):
    """FP32 tile of gate (half 0) or up (half 1)."""
    if STASH:
        return _unstash(x, scales, tile_m, tile_k + half * (F // TILE), M, 2 * F, WHOLE)
    else:
        return load_tile(x + half * F, tile_m, tile_k, M, F, 2 * F, WHOLE)


@triton.jit
def _one_result(  # type: ignore[no-untyped-def]
    dy, x, stash_scales, row_codes, row_scales, col_codes, col_scales, kept,
    tile_m, tile_k, M, F, row_stride, col_stride,
    LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr, KEEP: tl.constexpr, STASH: tl.constexpr, RESULT: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of gate (RESULT 0), of up (1), or of y (2), cast and stored."""
    gate = _load_half(x, stash_scales, 0, tile_m, tile_k, M, F, STASH, WHOLE)
    up = gate  # the gradient of up does not need it
    if RESULT != 1:
        up = _load_half(x, stash_scales, 1, tile_m, tile_k, M, F, STASH, WHOLE)
    if RESULT == 2:
        part = _product(gate, up)
    else:
        grad = load_tile(dy, tile_m, tile_k, M, F, F, WHOLE)
        dgate, dup = _gradients(grad, gate, up)
        part = dgate if RESULT == 0 else dup
    tile = tile_k + (F // TILE if RESULT == 1 else 0)
    width = F if RESULT == 2 else 2 * F
    if KEEP and RESULT < 2:
        _keep(kept, part, tile_m, tile, M, width)
    store_tile(
        part, tile_m, tile, M, width,
        row_codes, row_scales, row_stride, col_codes, col_scales, col_stride,
        LARGEST, POWER_OF_TWO, False, ROWS, COLUMNS, WHOLE,
    )  # fmt: skip


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    dy, x, stash_scales, row_codes, row_scales, col_codes, col_scales, y_codes, y_scales, kept,
    M, F, row_stride, col_stride, y_stride,
    LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr, KEEP: tl.constexpr, STASH: tl.constexpr, Y_COLUMNS: tl.constexpr,
):  # fmt: skip
    """F is a multiple of 128: a tile of dy gives one tile of each half, each by a program of its own.

    One result needs half of the registers of three, so twice the warps are at work; the neighbours
    read the same tiles at the same time, from L2.
    """
    RESULTS: tl.constexpr = 3 if Y_COLUMNS else 2
    tile_k, tile_m = tl.program_id(0) // RESULTS, tl.program_id(1)
    result = tl.program_id(0) % RESULTS
    if result == 0:
        _one_result(
            dy, x, stash_scales, row_codes, row_scales, col_codes, col_scales, kept,
            tile_m, tile_k, M, F, row_stride, col_stride,
            LARGEST, POWER_OF_TWO, ROWS, COLUMNS, WHOLE, KEEP, STASH, 0,
        )  # fmt: skip
    elif result == 1:
        _one_result(
            dy, x, stash_scales, row_codes, row_scales, col_codes, col_scales, kept,
            tile_m, tile_k, M, F, row_stride, col_stride,
            LARGEST, POWER_OF_TWO, ROWS, COLUMNS, WHOLE, KEEP, STASH, 1,
        )  # fmt: skip
    else:
        _one_result(
            dy, x, stash_scales, y_codes, y_scales, y_codes, y_scales, kept,
            tile_m, tile_k, M, F, y_stride, y_stride,
            LARGEST, POWER_OF_TWO, False, Y_COLUMNS, WHOLE, KEEP, STASH, 2,
        )  # fmt: skip


@triton.jit
def _backward_straddling_kernel(  # type: ignore[no-untyped-def]
    dy, x, row_codes, row_scales, col_codes, col_scales, kept, M, F, row_stride, col_stride,
    LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Any F: one tile of the result, which may hold columns of both halves (reads twice as much)."""
    tile_k, tile_m = tl.program_id(0), tl.program_id(1)
    m = tile_m * TILE + tl.arange(0, TILE)
    k = tile_k * TILE + tl.arange(0, TILE)
    inside = (m < M)[:, None] & (k < 2 * F)[None, :]
    feature = tl.where(k < F, k, k - F)[None, :]
    row = m.to(tl.int64)[:, None]
    grad = tl.load(dy + row * F + feature, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + row * 2 * F + feature, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * F + F + feature, mask=inside, other=0.0).to(tl.float32)
    dgate, dup = _gradients(grad, gate, up)
    part = tl.where((k < F)[None, :], dgate, dup)
    if KEEP:
        _keep(kept, part, tile_m, tile_k, M, 2 * F)
    store_tile(
        part, tile_m, tile_k, M, 2 * F,
        row_codes, row_scales, row_stride, col_codes, col_scales, col_stride,
        LARGEST, POWER_OF_TWO, False, ROWS, COLUMNS, WHOLE,
    )  # fmt: skip


class Activated(NamedTuple):
    """What the forward returns.

    Attributes:
        cast: operands of fc2.
        stash: the input in 8 bits, if it was asked for.
        kept: the BF16 intermediate `[M, F]`, if it was to be kept.
    """

    cast: BlockCast
    stash: Stash | None
    kept: Tensor | None


class ActivationGradients(NamedTuple):
    """What the backward returns.

    Attributes:
        cast: the gradient of the input `[M, 2F]`, cast: operands of fc1's dgrad and wgrad.
        y: the column-wise operand of silu(gate) * up, if it was asked for.
        kept: the BF16 gradient `[M, 2F]`, if it was to be kept.
    """

    cast: BlockCast
    y: BlockCast | None
    kept: Tensor | None


def swiglu_cast(
    x: Tensor,
    scale_format: ScaleFormat,
    rows: bool = True,
    columns: bool = True,
    keep: bool = False,
    stash: bool = False,
    warps: int | None = None,
) -> Activated:
    """Return the cast of silu(gate) * up.

    Args:
        x: `[M, 2F]` bfloat16 or float32, contiguous: gate, then up.
        scale_format: `power_of_two` or `float32`.
        rows: whether the operand of fc2's fprop is wanted.
        columns: whether the operand of fc2's wgrad is wanted (the backward can make it later).
        keep: return the BF16 intermediate `[M, F]` too (for tests).
        stash: return `x` itself in 8 bits too; F must be a multiple of 128.
        warps: of Triton's program; None for what was found best (`hopper`, or Triton).

    Raises:
        ValueError: `x` is not such a matrix.
    """
    m, twice = cast.check_matrix(x, "SwiGLU's input")
    if twice % 2:
        raise ValueError(f"SwiGLU's input must have an even number of columns, got {twice}")
    f = twice // 2
    by_cuda = warps is None and hopper.takes(x, m, f)
    if warps is None:
        warps = WARPS if columns and not stash else ONE_WAY_WARPS
    if stash and f % BLOCK:
        raise ValueError(f"a stash needs halves of whole blocks of {BLOCK} columns, got {f}")
    out = cast.allocate(m, f, x.device, (rows, columns))
    stashed = stashes.allocate(m, twice, x.device) if stash else None
    kept = torch.empty((m, f), dtype=torch.bfloat16, device=x.device) if keep else None
    if by_cuda:
        pow2 = scale_format == "power_of_two"
        hopper.run("swiglu", (m, f), out, pow2, x, kept=kept, stash=stashed)
        return Activated(out, stashed, kept)
    *operands, row_stride, col_stride = cast.pointers(out, x)
    stash_codes, stash_scales = stashed or (x, x)
    _forward_kernel[(triton.cdiv(f, BLOCK), triton.cdiv(m, BLOCK))](
        x, *operands, stash_codes, stash_scales, x if kept is None else kept,
        m, f, row_stride, col_stride,
        **cast.constants(out, scale_format, torch.bfloat16, m % BLOCK == 0 and f % BLOCK == 0),
        KEEP=keep,
        STASH=stash,
        num_warps=warps,
    )  # fmt: skip
    return Activated(out, stashed, kept)


def swiglu_backward_cast(
    dy: Tensor,
    x: Tensor | Stash,
    scale_format: ScaleFormat,
    rows: bool = True,
    columns: bool = True,
    keep: bool = False,
    y_columns: bool = False,
    warps: int | None = None,
) -> ActivationGradients:
    """Return the cast of the gradient of SwiGLU's input.

    Args:
        dy: `[M, F]`, the gradient of SwiGLU's result.
        x: `[M, 2F]`, its input, or the stash that the forward made of it.
        scale_format: `power_of_two` or `float32`.
        rows: whether the operand of fc1's dgrad is wanted.
        columns: whether the operand of fc1's wgrad is wanted.
        keep: return the BF16 gradient `[M, 2F]` too (fc1's bias gradient, or tests).
        y_columns: compute SwiGLU's result again and return the operand of fc2's wgrad.
        warps: of Triton's program; None for what was found best (`hopper`, or Triton).

    Raises:
        ValueError: the shapes do not belong together, or a tensor is not contiguous BF16 or FP32.
    """
    m, f = cast.check_matrix(dy, "SwiGLU's output gradient")
    stash = x if isinstance(x, Stash) else None
    straddling = f % BLOCK != 0
    if isinstance(x, Stash):
        if straddling or tuple(x.codes.shape) != (m, 2 * f):
            raise ValueError(f"the stash of SwiGLU's input must be that of [{m}, {2 * f}]")
        values, stash_scales = x
    else:
        if cast.check_matrix(x, "SwiGLU's input") != (m, 2 * f):
            raise ValueError(f"SwiGLU's input must be [{m}, {2 * f}], got {tuple(x.shape)}")
        values, stash_scales = x, x
    out = cast.allocate(m, 2 * f, dy.device, (rows, columns))
    kept = torch.empty((m, 2 * f), dtype=torch.bfloat16, device=dy.device) if keep else None
    if warps is None and hopper.takes(dy, m, f) and (stash or hopper.takes(values)):
        y = cast.allocate(m, f, dy.device, (False, True)) if y_columns else None
        source = "swiglu backward with y" if y_columns else "swiglu backward"
        pow2 = scale_format == "power_of_two"
        hopper.run(source, (m, f), out, pow2, values, dy=dy, y=y, kept=kept, stash=stash)
        return ActivationGradients(out, y, kept)
    if warps is None:
        warps = BACKWARD_WARPS
    *operands, row_stride, col_stride = cast.pointers(out, dy)
    fixed = cast.constants(out, scale_format, torch.bfloat16, m % BLOCK == 0 and not straddling)
    if straddling:
        _backward_straddling_kernel[(triton.cdiv(2 * f, BLOCK), triton.cdiv(m, BLOCK))](
            dy, values, *operands, dy if kept is None else kept, m, f, row_stride, col_stride,
            **fixed, KEEP=keep, num_warps=warps,
        )  # fmt: skip
        late = None
        if y_columns:
            late = swiglu_cast(values, scale_format, rows=False).cast
        return ActivationGradients(out, late, kept)
    y = cast.allocate(m, f, dy.device, (False, True)) if y_columns else None
    _, _, y_codes, y_scales, _, y_stride = cast.pointers(y or out, dy)
    results = 3 if y_columns else 2
    _backward_kernel[(results * triton.cdiv(f, BLOCK), triton.cdiv(m, BLOCK))](
        dy, values, stash_scales, *operands, y_codes, y_scales, dy if kept is None else kept,
        m, f, row_stride, col_stride, y_stride,
        **fixed, KEEP=keep, STASH=stash is not None, Y_COLUMNS=y_columns, num_warps=warps,
        **cast.registers(warps),
    )  # fmt: skip
    return ActivationGradients(out, y, kept)
