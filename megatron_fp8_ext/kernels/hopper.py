"""The casts of whole 128x128 tiles in CUDA C++ (`hopper.cu`), for Hopper.

`cast`, `swiglu` and `rmsnorm` come here by themselves when `takes` says yes: BF16, no partial tile. The rest
stays with Triton, and all of it with `MEGATRON_FP8_EXT_KERNELS=triton` in the environment. Codes and scales
are the same bits; SwiGLU's result may differ from Triton's by one BF16 rounding.
"""

from __future__ import annotations

import ctypes
import functools
import os
from importlib import resources
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_fp8_ext.fp8.reference import BLOCK
from megatron_fp8_ext.kernels import nvrtc, support

if TYPE_CHECKING:
    from megatron_fp8_ext.kernels.cast import BlockCast
    from megatron_fp8_ext.kernels.stash import Stash

VARIABLE = "MEGATRON_FP8_EXT_KERNELS"
THREADS = 256
# Programs on a multiprocessor that the compiler must leave registers for (80 of them at 3).
PROGRAMS = 3
SOURCES = ("plain", "swiglu", "swiglu backward", "swiglu backward with y", "rmsnorm")
_POINTERS = (
    "x", "dy", "gain", "rstd", "row_codes", "row_scales", "column_codes", "column_scales",
    "y_codes", "y_scales", "kept", "stash_codes", "stash_scales",
)  # fmt: skip
_NUMBERS = ("rows", "columns", "row_stride", "column_stride", "y_stride")


class Arguments(ctypes.Structure):
    """`struct Arguments` of hopper.cu."""

    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [
        (name, ctypes.c_int) for name in _NUMBERS
    ]


def takes(x: Tensor, *multiples: int) -> bool:
    """Whether the CUDA kernels serve matrices like `x` whose sizes are `multiples`."""
    return (
        x.is_cuda
        and x.dtype is torch.bfloat16
        and all(size % BLOCK == 0 and size > 0 for size in multiples)
        and reason(x.device.index) is None
    )


@functools.cache
def reason(device: int) -> str | None:
    """Say why the CUDA kernels cannot run on a GPU, in a clause; None if they can."""
    if os.environ.get(VARIABLE) == "triton":
        return f"{VARIABLE}=triton"
    if support.interpreted():
        return "Triton interprets its kernels"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return "not a Hopper GPU"
    try:
        kernel(device, "plain", True, False, True, False, False)
    except (nvrtc.CudaError, OSError, AttributeError) as error:
        return str(error)
    return None


def options(
    source: str, rows: bool, columns: bool, power_of_two: bool, keep: bool, stash: bool
) -> tuple[str, list[str]]:
    """The text of hopper.cu and the options that make one kernel of it."""
    text = resources.files("megatron_fp8_ext.kernels").joinpath("hopper.cu").read_text("utf-8")
    macros = {
        "SOURCE": SOURCES.index(source),
        "ROWS": int(rows),
        "COLUMNS": int(columns),
        "POWER_OF_TWO": int(power_of_two),
        "KEEP": int(keep),
        "STASH": int(stash),
        "BLOCKS": PROGRAMS,
    }
    return text, [
        "--gpu-architecture=sm_90a",
        "--std=c++17",
        *(f"-D{name}={value}" for name, value in macros.items()),
    ]


@functools.cache
def kernel(
    device: int,
    source: str,
    rows: bool,
    columns: bool,
    power_of_two: bool,
    keep: bool,
    stash: bool,
) -> nvrtc.Kernel:
    """Compile and load one kernel, once a process."""
    text, given = options(source, rows, columns, power_of_two, keep, stash)
    with torch.cuda.device(device):
        return nvrtc.Kernel(nvrtc.compile_source(text, "hopper.cu", given), "cast_tiles")


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
    """
    rows, columns = size
    made = Arguments(rows=rows, columns=columns, x=x.data_ptr())
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
    results = 3 if y is not None else 2 if dy is not None else 1
    device = x.device.index
    found = kernel(
        device,
        source,
        out.rows is not None,
        out.columns is not None,
        power_of_two,
        kept is not None,
        stash is not None,
    )
    grid = (results * (columns // BLOCK), rows // BLOCK)
    if device == torch.cuda.current_device():
        found(grid, THREADS, made)
    else:
        with torch.cuda.device(device):
            found(grid, THREADS, made)
