"""RMSNorm with the cast of its result, and its backward with the residual add and the cast.

y = x / sqrt(mean(x^2) + eps) * w is computed in FP32 and rounded to BF16 once; that value is cast.
A row-wise block needs the whole row's mean and a column-wise block 128 rows of it, so there are two
kernels: one keeps a row in registers and writes rstd and the row-wise operand (3 bytes an element), the
other computes y again from x and rstd and writes the column-wise operand (3 bytes). The second may run
as late as the backward, which reads x anyway: then no copy of y is kept for wgrad at all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_fp8_ext.fp8.reference import BLOCK
from megatron_fp8_ext.kernels import cast, hopper, main_grad, support
from megatron_fp8_ext.kernels.cast import (
    ONE_WAY_WARPS,
    TILE,
    BlockCast,
    encode,
    load_tile,
    magnitude,
    scale_of,
    store_tile,
)
from megatron_fp8_ext.recipe import ScaleFormat

# Longest row that one program keeps in registers (7B: 3584, 32B: 5120, 72B: 8192).
MAX_HIDDEN = 16384
# Warps of the backward that its registers leave room for on a multiprocessor (61 at 8 elements a thread);
# each program of them has its own partial sum of the weight's gradient.
_BACKWARD_WARPS_PER_SM = 32


@triton.jit
def _store_row(  # type: ignore[no-untyped-def]
    y, row, H, codes, scales, stride,
    LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Cast one row `[WIDTH]` whose tail beyond H is zero; `row` is 64-bit."""
    blocks = tl.reshape(y, (WIDTH // TILE, TILE))
    scale, inverse = scale_of(tl.max(magnitude(blocks), axis=1), LARGEST, POWER_OF_TWO)
    block = tl.arange(0, WIDTH // TILE)
    column = block[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(codes + row * H + column, encode(blocks * scale[:, None]), mask=column < H)
    tl.store(scales + block * stride + row, inverse, mask=block * TILE < H)


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    x, weight, eps, rstd, codes, scales, kept, H, stride,
    LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    at = row * H + column
    value = tl.load(x + at, mask=column < H, other=0.0).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(value * value, axis=0) / H + eps))
    tl.store(rstd + row, inverse)
    if ROWS or KEEP:
        gain = tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32)
        y = (value * inverse * gain).to(tl.bfloat16)
        if KEEP:
            tl.store(kept + at, y, mask=column < H)
        if ROWS:
            _store_row(
                y.to(tl.float32), row, H, codes, scales, stride, LARGEST, POWER_OF_TWO, WIDTH
            )


@triton.jit
def _columns_kernel(  # type: ignore[no-untyped-def]
    x, weight, rstd, col_codes, col_scales, M, H, stride,
    LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    tile_k, tile_m = tl.program_id(0), tl.program_id(1)
    m = tile_m * TILE + tl.arange(0, TILE)
    k = tile_k * TILE + tl.arange(0, TILE)
    inverse = tl.load(rstd + m, mask=m < M, other=0.0)
    gain = tl.load(weight + k, mask=k < H, other=0.0).to(tl.float32)
    value = load_tile(x, tile_m, tile_k, M, H, H, WHOLE)
    y = (value * inverse[:, None] * gain[None, :]).to(tl.bfloat16).to(tl.float32)
    store_tile(
        y, tile_m, tile_k, M, H,
        col_codes, col_scales, stride, col_codes, col_scales, stride,
        LARGEST, POWER_OF_TWO, False, ROWS, COLUMNS, WHOLE,
    )  # fmt: skip


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    dy, x, weight, rstd, residual, dx, dweight, codes, scales, M, H, stride,
    LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Rows program, program + programs, ...; `dweight[program]` gets their sum."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, WIDTH)
    inside = column < H
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    for index in tl.range(0, M - program, programs):
        row = program.to(tl.int64) + index
        at = row * H + column
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row)
        normal = value * inverse
        total += grad * normal
        scaled = grad * gain
        mean = tl.sum(scaled * normal, axis=0) / H
        result = inverse * (scaled - normal * mean)
        if RESIDUAL:
            result += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = result.to(tl.bfloat16)
        tl.store(dx + at, rounded, mask=inside)
        if ROWS:
            _store_row(
                rounded.to(tl.float32), row, H, codes, scales, stride, LARGEST, POWER_OF_TWO, WIDTH
            )
    tl.store(dweight + program * H + column, total, mask=inside)


class Normed(NamedTuple):
    """What the forward returns.

    Attributes:
        cast: operands of the linear layer that follows.
        rstd: `[M]` FP32, 1 / sqrt(mean(x^2) + eps): what the backward and `rmsnorm_columns` need.
        kept: the BF16 intermediate `[M, H]`, if it was to be kept.
    """

    cast: BlockCast
    rstd: Tensor
    kept: Tensor | None


class NormGradients(NamedTuple):
    """What the backward returns.

    Attributes:
        dx: `[M, H]` BF16, the residual's gradient included where one was given.
        dweight: `[H]`.
        cast: `dx` cast once for both of its uses, dgrad and wgrad of the linear layer before.
    """

    dx: Tensor
    dweight: Tensor
    cast: BlockCast


def _width(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    m, h = cast.check_matrix(x, "RMSNorm's input")
    if tuple(weight.shape) != (h,):
        raise ValueError(f"RMSNorm's weight must be [{h}], got {tuple(weight.shape)}")
    if h > MAX_HIDDEN:
        raise ValueError(f"RMSNorm over {h} columns: one program holds up to {MAX_HIDDEN}")
    return m, h, max(int(triton.next_power_of_2(h)), BLOCK)


def _row_warps(width: int) -> int:
    return max(1, min(16, width // 512))


def rmsnorm_cast(
    x: Tensor,
    weight: Tensor,
    eps: float,
    scale_format: ScaleFormat,
    rows: bool = True,
    columns: bool = True,
    keep: bool = False,
) -> Normed:
    """Normalize the rows of `x` and cast the result.

    Args:
        x: `[M, H]` bfloat16 or float32, contiguous.
        weight: `[H]`.
        eps: added to the mean square.
        scale_format: `power_of_two` or `float32`.
        rows: whether the operand of fprop is wanted.
        columns: whether the operand of wgrad is wanted now (`rmsnorm_columns` makes it later).
        keep: return the BF16 intermediate too (for tests).

    Raises:
        ValueError: shapes that do not belong together, or rows longer than `MAX_HIDDEN`.
    """
    m, h, width = _width(x, weight)
    out = cast.allocate(m, h, x.device, (rows, False))
    rstd = torch.empty(m, dtype=torch.float32, device=x.device)
    kept = torch.empty((m, h), dtype=torch.bfloat16, device=x.device) if keep else None
    if rows and hopper.takes_norm(x, weight):
        pow2 = scale_format == "power_of_two"
        hopper.norm_rows(x, weight, eps, rstd, out, pow2, kept)
        if columns:
            late = rmsnorm_columns(x, weight, rstd, scale_format)
            out = out._replace(columns=late.columns)
        return Normed(out, rstd, kept)
    codes, scales, _, _, stride, _ = cast.pointers(out, x)
    _rows_kernel[(m,)](
        x, weight, eps, rstd, codes, scales, x if kept is None else kept, h, stride,
        LARGEST=float(torch.finfo(torch.bfloat16).max),
        POWER_OF_TWO=scale_format == "power_of_two",
        ROWS=rows,
        WIDTH=width,
        KEEP=keep,
        num_warps=_row_warps(width),
    )  # fmt: skip
    if columns:
        out = out._replace(columns=rmsnorm_columns(x, weight, rstd, scale_format).columns)
    return Normed(out, rstd, kept)


def rmsnorm_columns(
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    scale_format: ScaleFormat,
    warps: int | None = None,
) -> BlockCast:
    """Return the column-wise operand of the normalized rows, from `x` and their rstd.

    `warps` is of Triton's program; None for what was found best (`hopper`, or Triton).
    """
    m, h, _ = _width(x, weight)
    out = cast.allocate(m, h, x.device, (False, True))
    if warps is None and hopper.takes(x, m, h) and hopper.takes(weight):
        pow2 = scale_format == "power_of_two"
        hopper.run("rmsnorm", (m, h), out, pow2, x, gain=weight, rstd=rstd)
        return out
    if warps is None:
        warps = ONE_WAY_WARPS
    _, _, codes, scales, _, stride = cast.pointers(out, x)
    _columns_kernel[(triton.cdiv(h, BLOCK), triton.cdiv(m, BLOCK))](
        x, weight, rstd, codes, scales, m, h, stride,
        **cast.constants(out, scale_format, torch.bfloat16, m % BLOCK == 0 and h % BLOCK == 0),
        num_warps=warps,
    )  # fmt: skip
    return out


def rmsnorm_backward_cast(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    scale_format: ScaleFormat,
    residual: Tensor | None = None,
    rows: bool = True,
    columns: bool = True,
    dtype: torch.dtype = torch.float32,
    add_to: Tensor | None = None,
) -> NormGradients:
    """Gradients of RMSNorm, the sum with the residual stream's gradient, and the cast of it.

    Args:
        dy: `[M, H]`, gradient of the normalized rows.
        x: `[M, H]`, the forward's input.
        weight: `[H]`.
        rstd: `[M]`, from the forward.
        scale_format: `power_of_two` or `float32`.
        residual: `[M, H]`, gradient that reaches `x` past the norm; added before the rounding.
        rows: whether the operand of dgrad is wanted.
        columns: whether the operand of wgrad is wanted.
        dtype: of the weight's gradient, BF16 or FP32; it is summed in FP32.
        add_to: `[H]` BF16 or FP32, where that is added in place of a new tensor.

    Raises:
        ValueError: shapes that do not belong together.
    """
    m, h, width = _width(x, weight)
    for tensor, name in ((dy, "output gradient"), (residual, "residual gradient")):
        if tensor is not None and cast.check_matrix(tensor, f"RMSNorm's {name}") != (m, h):
            raise ValueError(f"RMSNorm's {name} must be [{m}, {h}], got {tuple(tensor.shape)}")
    out = cast.allocate(m, h, x.device, (rows, False))
    dx = torch.empty((m, h), dtype=torch.bfloat16, device=x.device)
    if not rows and not columns and hopper.takes_norm(x, weight):
        # As many programs as its registers leave room for on the GPU.
        room = support.processors(x.device) * max(1, 1024 // hopper.norm_threads(h))
        parts = hopper.norm_backward(dy, x, weight, rstd, dx, min(m, room), residual)
        return NormGradients(dx, hopper.sum_of_parts(parts, dtype, add_to), out)
    warps = max(1, min(16, width // 256))
    programs = max(1, min(m, support.processors(x.device) * (_BACKWARD_WARPS_PER_SM // warps)))
    dweight = torch.empty((programs, h), dtype=torch.float32, device=x.device)
    codes, scales, _, _, stride, _ = cast.pointers(out, x)
    _backward_kernel[(programs,)](
        dy, x, weight, rstd, x if residual is None else residual, dx, dweight,
        codes, scales, m, h, stride,
        LARGEST=float(torch.finfo(torch.bfloat16).max),
        POWER_OF_TWO=scale_format == "power_of_two",
        ROWS=rows,
        WIDTH=width,
        RESIDUAL=residual is not None,
        num_warps=warps,
    )  # fmt: skip
    if columns:
        late = cast.cast_1x128(dx, scale_format, rows=False)
        out = out._replace(columns=late.columns)
    return NormGradients(dx, main_grad.put(dweight.sum(dim=0), dtype, add_to), out)
