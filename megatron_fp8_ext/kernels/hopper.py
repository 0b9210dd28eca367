"""Casts, SwiGLU, RMSNorm and RoPE in CUDA C++ for Hopper (`hopper_tiles.cu`, `_norm`, `_rope`, `_sums`).

`cast`, `swiglu` and `rmsnorm` come here by themselves when `takes` says yes: BF16, no partial block. The rest
stays with Triton, and all of it with `MEGATRON_FP8_EXT_KERNELS=triton` in the environment. Codes and scales
are the same bits; SwiGLU's result may differ from Triton's by one BF16 rounding.
"""

from __future__ import annotations

import ctypes
import functools
import os
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_fp8_ext.fp8.reference import BLOCK
from megatron_fp8_ext.kernels import nvrtc, support

if TYPE_CHECKING:
    from megatron_fp8_ext.kernels.cast import BlockCast
    from megatron_fp8_ext.kernels.stash import Stash

VARIABLE = "MEGATRON_FP8_EXT_KERNELS"
THREADS = 256
# Programs on a multiprocessor that the compiler must leave registers for (80 of them at 3); SwiGLU's backward
# has room for two, with the three tiles that it reads in shared memory.
PROGRAMS, BACKWARD_PROGRAMS = 3, 2
# Rows of RMSNorm's backward on their way to a program: at most 208 KiB for rows of MAX_HIDDEN.
STAGES = 4
SOURCES = ("plain", "swiglu", "swiglu backward", "swiglu backward with y", "rmsnorm")
# A row of RMSNorm is in the registers of one warp (forward), or eight columns in a thread's (backward).
MAX_HIDDEN = 8192
_TILES, _NORM, _ROPE = "hopper_tiles.cu", "hopper_norm.cu", "hopper_rope.cu"
_SUMS = "hopper_sums.cu"
_ENTRY = {_TILES: "cast_tiles", _NORM: "rmsnorm_rows", _ROPE: "rotate_qkv", _SUMS: "sum_rows"}
Macros = tuple[tuple[str, int], ...]


def _struct(name: str, pointers: str, integers: str, floats: str = "") -> type[ctypes.Structure]:
    """`struct Arguments` of a source file, its members in order."""
    fields: list[Any] = [(field, ctypes.c_void_p) for field in pointers.split()]
    fields += [(field, ctypes.c_int) for field in integers.split()]
    fields += [(field, ctypes.c_float) for field in floats.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_TileArguments = _struct(
    "TileArguments",
    "x dy gain rstd row_codes row_scales column_codes column_scales y_codes y_scales kept "
    "stash_codes stash_scales totals",
    "rows columns row_stride column_stride y_stride",
)
_NormArguments = _struct(
    "NormArguments",
    "x dy gain rstd row_codes row_scales kept past dx dweight",
    "rows row_stride",
    "eps",
)
_SumArguments = _struct("SumArguments", "parts total", "rows columns")
_RopeArguments = _struct("RopeArguments", "qkv q k v cosine sine", "groups queries batch")


def takes(x: Tensor, *multiples: int) -> bool:
    """Whether the CUDA kernels serve matrices like `x` whose sizes are `multiples`."""
    return (
        x.is_cuda
        and x.dtype is torch.bfloat16
        and all(size % BLOCK == 0 and size > 0 for size in multiples)
        and reason(x.device.index) is None
    )


# Devices whose kernels are under their first check: those calls must come here.
_checking: set[int] = set()
_verdicts: dict[int, str | None] = {}


def reason(device: int) -> str | None:
    """Say why the CUDA kernels are not for this GPU, in a clause; None if they run and are right."""
    if device in _checking:
        return None
    if device not in _verdicts:
        _verdicts[device] = _reason(device)
    return _verdicts[device]


def _reason(device: int) -> str | None:
    if os.environ.get(VARIABLE) == "triton":
        return f"{VARIABLE}=triton"
    if support.interpreted():
        return "Triton interprets its kernels"
    if not support.is_hopper(device):
        return "not a Hopper GPU"
    from megatron_fp8_ext.kernels import self_check

    _checking.add(device)
    try:
        with torch.cuda.device(device):
            return self_check.failure(torch.device("cuda", device))
    except (nvrtc.CudaError, OSError, AttributeError) as error:
        return str(error)
    finally:
        _checking.discard(device)


def tile_macros(
    source: str,
    rows: bool,
    columns: bool,
    power_of_two: bool,
    keep: bool,
    stash: bool,
    total: bool = False,
) -> Macros:
    """The macros of hopper_tiles.cu."""
    return (
        ("SOURCE", SOURCES.index(source)),
        ("ROWS", int(rows)),
        ("COLUMNS", int(columns)),
        ("POWER_OF_TWO", int(power_of_two)),
        ("KEEP", int(keep)),
        ("STASH", int(stash)),
        ("TOTAL", int(total)),
        # Sums of columns beside a cast need registers too.
        ("BLOCKS", BACKWARD_PROGRAMS if "backward" in source or total else PROGRAMS),
    )


def tile_shared(source: str) -> int:
    """Bytes of dynamic shared memory: three BF16 tiles, inputs and then results, for SwiGLU's backward."""
    return 3 * 2 * BLOCK * BLOCK if "backward" in source else 0


def norm_macros(
    hidden: int, backward: bool, power_of_two: bool, keep: bool, residual: bool
) -> Macros:
    """The macros of hopper_norm.cu."""
    return (
        ("COLUMNS", hidden),
        ("BACKWARD", int(backward)),
        ("POWER_OF_TWO", int(power_of_two)),
        ("KEEP", int(keep)),
        ("RESIDUAL", int(residual)),
        ("STAGES", STAGES),
    )


def norm_shared(hidden: int, residual: bool) -> int:
    """Bytes of dynamic shared memory: STAGES rows of what RMSNorm's backward reads."""
    return STAGES * norm_threads(hidden) * (16 * (3 if residual else 2) + 4)


def rope_macros(head: int, backward: bool) -> Macros:
    """The macros of hopper_rope.cu."""
    return (("HEAD", head), ("BACKWARD", int(backward)), ("POWER_OF_TWO", 1))


def sum_macros(half: bool, add: bool) -> Macros:
    """The macros of hopper_sums.cu."""
    return (("HALF", int(half)), ("ADD", int(add)), ("POWER_OF_TWO", 1))


def compile_kernel(file: str, macros: Macros, headers: tuple[str, ...] = ("hopper.cuh",)) -> bytes:
    """Return the cubin of one kernel; needs no GPU."""
    folder = resources.files("megatron_fp8_ext.kernels")
    text = "".join(folder.joinpath(name).read_text("utf-8") for name in (*headers, file))
    options = ["--gpu-architecture=sm_90a", "--std=c++17"]
    return nvrtc.compile_source(
        text, file, [*options, *(f"-D{name}={value}" for name, value in macros)]
    )


@functools.cache
def _kernel(device: int, file: str, macros: Macros, shared: int = 0) -> nvrtc.Kernel:
    """Compile and load one kernel, once a process."""
    with torch.cuda.device(device):
        return nvrtc.Kernel(compile_kernel(file, macros), _ENTRY[file], shared)


@functools.cache
def _tile_kernel(device: int, source: str, *switches: bool) -> nvrtc.Kernel:
    """`switches` are those of `tile_macros`, in its order."""
    return _kernel(device, _TILES, tile_macros(source, *switches), tile_shared(source))


@functools.cache
def _norm_kernel(device: int, hidden: int, backward: bool, *switches: bool) -> nvrtc.Kernel:
    """`switches` are the others of `norm_macros`, the residual last."""
    shared = norm_shared(hidden, switches[-1]) if backward else 0
    return _kernel(device, _NORM, norm_macros(hidden, backward, *switches), shared)


def launch(
    found: nvrtc.Kernel, device: int, grid: tuple[int, int], threads: int, made: ctypes.Structure
) -> None:
    """Launch on torch's current stream of that device."""
    if device == torch.cuda.current_device():
        found(grid, threads, made)
    else:
        with torch.cuda.device(device):
            found(grid, threads, made)


def run(
    source: str,
    size: tuple[int, int],
    out: BlockCast,
    power_of_two: bool,
    x: Tensor,
    *,
    dy: Tensor | None = None,
    gain: Tensor | None = None,
    rstd: Tensor | None = None,
    y: BlockCast | None = None,
    kept: Tensor | None = None,
    stash: Stash | None = None,
    totals: Tensor | None = None,
) -> None:
    """Launch one kernel.

    Args:
        source: one of SOURCES.
        size: rows and columns; columns of one half for SwiGLU's backward.
        out: where the cast goes.
        power_of_two: whether scales are powers of two.
        x: `[rows, columns]`, or `[rows, 2 columns]` for SwiGLU.
        dy: `[rows, columns]`, for SwiGLU's backward.
        gain: `[columns]` BF16, for RMSNorm.
        rstd: `[rows]` FP32, for RMSNorm.
        y: where the column-wise cast of SwiGLU's result goes, for its backward.
        kept: where the tile itself goes.
        stash: where SwiGLU's input goes in 8 bits, or for its backward comes from instead of `x`.
        totals: `[rows / 128, columns]` FP32, where the sums of each tile's columns go.
    """
    rows, columns = size
    made: Any = _TileArguments(rows=rows, columns=columns, x=x.data_ptr())
    if out.rows is not None:
        made.row_codes, made.row_scales = out.rows.codes.data_ptr(), out.rows.scale_inv.data_ptr()
        made.row_stride = out.rows.scale_inv.stride(0)
    if out.columns is not None:
        made.column_codes = out.columns.codes.data_ptr()
        made.column_scales = out.columns.scale_inv.data_ptr()
        made.column_stride = out.columns.scale_inv.stride(0)
    if dy is not None:
        made.dy = dy.data_ptr()
    if gain is not None and rstd is not None:
        made.gain, made.rstd = gain.data_ptr(), rstd.data_ptr()
    if y is not None and y.columns is not None:
        made.y_codes, made.y_scales = y.columns.codes.data_ptr(), y.columns.scale_inv.data_ptr()
        made.y_stride = y.columns.scale_inv.stride(0)
    if kept is not None:
        made.kept = kept.data_ptr()
    if stash is not None:
        made.stash_codes, made.stash_scales = stash.codes.data_ptr(), stash.scales.data_ptr()
    if totals is not None:
        made.totals = totals.data_ptr()
    device = x.device.index
    found = _tile_kernel(
        device,
        source,
        out.rows is not None,
        out.columns is not None,
        power_of_two,
        kept is not None,
        stash is not None,
        totals is not None,
    )
    launch(found, device, (columns // BLOCK, rows // BLOCK), THREADS, made)


def takes_norm(x: Tensor, gain: Tensor) -> bool:
    """Whether the CUDA kernels serve RMSNorm of these rows."""
    return (
        x.dtype is torch.bfloat16
        and gain.dtype is torch.bfloat16
        and x.shape[0] > 0
        and x.shape[1] % BLOCK == 0
        and x.shape[1] <= MAX_HIDDEN
        and x.is_cuda
        and reason(x.device.index) is None
    )


def norm_rows(
    x: Tensor,
    gain: Tensor,
    eps: float,
    rstd: Tensor,
    out: BlockCast,
    power_of_two: bool,
    kept: Tensor | None = None,
) -> None:
    """RMSNorm's forward: rstd and the row-wise cast of the result (`rmsnorm.rmsnorm_cast`)."""
    rows, hidden = x.shape
    assert out.rows is not None
    made: Any = _NormArguments(rows=rows, eps=eps, x=x.data_ptr(), gain=gain.data_ptr())
    made.rstd, made.row_codes = rstd.data_ptr(), out.rows.codes.data_ptr()
    made.row_scales, made.row_stride = out.rows.scale_inv.data_ptr(), out.rows.scale_inv.stride(0)
    if kept is not None:
        made.kept = kept.data_ptr()
    device = x.device.index
    found = _norm_kernel(device, hidden, False, power_of_two, kept is not None, False)
    launch(found, device, (-(-rows // 8), 1), THREADS, made)


def norm_backward(
    dy: Tensor,
    x: Tensor,
    gain: Tensor,
    rstd: Tensor,
    dx: Tensor,
    programs: int,
    residual: Tensor | None,
) -> Tensor:
    """RMSNorm's backward plus `residual` into `dx`; returns the weight's gradient of each program, FP32."""
    rows, hidden = x.shape
    dweight = torch.empty((programs, hidden), dtype=torch.float32, device=x.device)
    made: Any = _NormArguments(rows=rows, x=x.data_ptr(), dy=dy.data_ptr(), gain=gain.data_ptr())
    made.rstd, made.dx, made.dweight = rstd.data_ptr(), dx.data_ptr(), dweight.data_ptr()
    device = x.device.index
    if residual is not None:
        made.past = residual.data_ptr()
    found = _norm_kernel(device, hidden, True, True, False, residual is not None)
    launch(found, device, (programs, 1), norm_threads(hidden), made)
    return dweight


def norm_threads(hidden: int) -> int:
    """Threads of a program of RMSNorm's backward: one for eight columns, in whole warps."""
    return -(-hidden // (8 * 32)) * 32


@functools.cache
def _sum_kernel(device: int, half: bool, add: bool) -> nvrtc.Kernel:
    return _kernel(device, _SUMS, sum_macros(half, add))


def sum_of_parts(parts: Tensor, dtype: torch.dtype, add_to: Tensor | None = None) -> Tensor:
    """Sum partial sums `[parts, columns]` FP32 over their first dimension, and round once.

    Args:
        parts: what programs of these kernels summed, contiguous; columns in whole blocks.
        dtype: of the result, BF16 or FP32.
        add_to: `[columns]` BF16 or FP32, what is added to and returned in place of a new tensor.
    """
    rows, columns = parts.shape
    total = add_to
    if total is None:
        total = torch.empty(columns, dtype=dtype, device=parts.device)
    made: Any = _SumArguments(rows=rows, columns=columns, parts=parts.data_ptr())
    made.total, device = total.data_ptr(), parts.device.index
    found = _sum_kernel(device, total.dtype is torch.bfloat16, add_to is not None)
    launch(found, device, (columns // 32, 1), 1024, made)
    return total


@functools.cache
def _rope_kernel(device: int, head: int, backward: bool) -> nvrtc.Kernel:
    return _kernel(device, _ROPE, rope_macros(head, backward))


def rotate_qkv(
    qkv: Tensor,
    parts: tuple[Tensor, ...],
    cosine: Tensor,
    sine: Tensor,
    groups: int,
    queries: int,
    backward: bool,
) -> None:
    """Out of `qkv` into rotated `parts` (q, k, v), or back (`rope.split_and_rotate`)."""
    s, b = qkv.shape[:2]
    head = 2 * cosine.shape[1]
    made: Any = _RopeArguments(groups=groups, queries=queries, batch=b, qkv=qkv.data_ptr())
    made.q, made.k, made.v = (part.data_ptr() for part in parts)
    made.cosine, made.sine = cosine.data_ptr(), sine.data_ptr()
    device = qkv.device.index
    threads = min(256, -(-groups * (queries + 2) * head // (16 * 32)) * 32)
    launch(_rope_kernel(device, head, backward), device, (s * b, 1), threads, made)
