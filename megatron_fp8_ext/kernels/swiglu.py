"""SwiGLU with the cast of its result, forward and backward, each in one pass.

x = [gate, up] is the output of fc1, `[M, 2F]`; y = silu(gate) * up, `[M, F]`, is the input of fc2.
Both are computed in FP32 and rounded to BF16 once, and that BF16 value is what is cast.
Per element of y the forward moves 4 + 2 bytes (unfused: 4 + 2, and 2 + 2 for the cast), the backward 6 + 4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_fp8_ext.fp8.reference import BLOCK
from megatron_fp8_ext.kernels import cast
from megatron_fp8_ext.kernels.cast import TILE, WARPS, BlockCast, load_tile, store_tile
from megatron_fp8_ext.recipe import ScaleFormat


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
def _forward_kernel(  # type: ignore[no-untyped-def]
    x, row_codes, row_scales, col_codes, col_scales, kept, M, F, row_stride, col_stride,
    LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    tile_k, tile_m = tl.program_id(0), tl.program_id(1)
    gate = load_tile(x, tile_m, tile_k, M, F, 2 * F, WHOLE)
    up = load_tile(x + F, tile_m, tile_k, M, F, 2 * F, WHOLE)
    y = _round(gate / (1.0 + tl.exp(-gate)) * up)
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
def _backward_kernel(  # type: ignore[no-untyped-def]
    dy, x, row_codes, row_scales, col_codes, col_scales, kept, M, F, row_stride, col_stride,
    LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """F is a multiple of 128: a tile of dy gives one tile of each half."""
    tile_k, tile_m = tl.program_id(0), tl.program_id(1)
    grad = load_tile(dy, tile_m, tile_k, M, F, F, WHOLE)
    gate = load_tile(x, tile_m, tile_k, M, F, 2 * F, WHOLE)
    up = load_tile(x + F, tile_m, tile_k, M, F, 2 * F, WHOLE)
    dgate, dup = _gradients(grad, gate, up)
    for half in tl.static_range(2):
        part = dgate if half == 0 else dup
        tile = tile_k + half * (F // TILE)
        if KEEP:
            _keep(kept, part, tile_m, tile, M, 2 * F)
        store_tile(
            part, tile_m, tile, M, 2 * F,
            row_codes, row_scales, row_stride, col_codes, col_scales, col_stride,
            LARGEST, POWER_OF_TWO, False, ROWS, COLUMNS, WHOLE,
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


def swiglu_cast(
    x: Tensor,
    scale_format: ScaleFormat,
    rows: bool = True,
    columns: bool = True,
    keep: bool = False,
    warps: int = WARPS,
) -> tuple[BlockCast, Tensor | None]:
    """Return the cast of silu(gate) * up, and that product itself if it is to be kept.

    Args:
        x: `[M, 2F]` bfloat16 or float32, contiguous: gate, then up.
        scale_format: `power_of_two` or `float32`.
        rows: whether the operand of fc2's fprop is wanted.
        columns: whether the operand of fc2's wgrad is wanted.
        keep: return the BF16 intermediate `[M, F]` too (for tests).
        warps: warps of a program.

    Raises:
        ValueError: `x` is not such a matrix.
    """
    m, twice = cast.check_matrix(x, "SwiGLU's input")
    if twice % 2:
        raise ValueError(f"SwiGLU's input must have an even number of columns, got {twice}")
    f = twice // 2
    out = cast.allocate(m, f, x.device, (rows, columns))
    kept = torch.empty((m, f), dtype=torch.bfloat16, device=x.device) if keep else None
    *operands, row_stride, col_stride = cast.pointers(out, x)
    _forward_kernel[(triton.cdiv(f, BLOCK), triton.cdiv(m, BLOCK))](
        x, *operands, x if kept is None else kept, m, f, row_stride, col_stride,
        **cast.constants(out, scale_format, torch.bfloat16, m % BLOCK == 0 and f % BLOCK == 0),
        KEEP=keep,
        num_warps=warps,
    )  # fmt: skip
    return out, kept


def swiglu_backward_cast(
    dy: Tensor,
    x: Tensor,
    scale_format: ScaleFormat,
    rows: bool = True,
    columns: bool = True,
    keep: bool = False,
    warps: int = WARPS,
) -> tuple[BlockCast, Tensor | None]:
    """Return the cast of the gradient of SwiGLU's input, and the gradient itself if it is kept.

    Args:
        dy: `[M, F]`, the gradient of SwiGLU's result.
        x: `[M, 2F]`, its input.
        scale_format: `power_of_two` or `float32`.
        rows: whether the operand of fc1's dgrad is wanted.
        columns: whether the operand of fc1's wgrad is wanted.
        keep: return the BF16 gradient `[M, 2F]` too (fc1's bias gradient, or tests).
        warps: warps of a program.

    Raises:
        ValueError: the shapes do not belong together, or a tensor is not contiguous BF16 or FP32.
    """
    m, f = cast.check_matrix(dy, "SwiGLU's output gradient")
    if cast.check_matrix(x, "SwiGLU's input") != (m, 2 * f):
        raise ValueError(f"SwiGLU's input must be [{m}, {2 * f}], got {tuple(x.shape)}")
    out = cast.allocate(m, 2 * f, x.device, (rows, columns))
    kept = torch.empty((m, 2 * f), dtype=torch.bfloat16, device=x.device) if keep else None
    *operands, row_stride, col_stride = cast.pointers(out, x)
    straddling = f % BLOCK != 0
    kernel = _backward_straddling_kernel if straddling else _backward_kernel
    tiles = triton.cdiv(2 * f if straddling else f, BLOCK)
    kernel[(tiles, triton.cdiv(m, BLOCK))](
        dy, x, *operands, x if kept is None else kept, m, f, row_stride, col_stride,
        **cast.constants(out, scale_format, torch.bfloat16, m % BLOCK == 0 and not straddling),
        KEEP=keep,
        num_warps=warps,
    )  # fmt: skip
    return out, kept
