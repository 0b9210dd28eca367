"""x w^T (+ a bias, + a matrix) in block-scaled FP8 by a kernel of our own for Hopper (`hopper_gemm.cu`).

Its bits are cuBLASLt's (tests/gpu/test_hopper_gemm.py). `suits` says for which products it is the faster one.
The plan, tiles of 256 x 128 by two warpgroups that multiply and one that loads, is like DeepGEMM's.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_fp8_ext.fp8.reference import BLOCK
from megatron_fp8_ext.kernels import cast, hopper, nvrtc, self_check, support
from megatron_fp8_ext.kernels.cast import Operand
from megatron_fp8_ext.kernels.cublaslt import VARIABLE

FILE, ENTRY = "hopper_gemm.cu", "block_scaled_gemm"
TILE_M, TILE_N = 256, 128  # of a block's result
THREADS = 384  # two warpgroups multiply, one loads
# What a block's 384 threads are launched with, 168 each, shared out: 128 x 40 + 256 x 232.
LOADER_REGISTERS, MULTIPLIER_REGISTERS = 40, 232
# Blocks with tiles beside each other that share rows of `x`: 2, or 1, which takes at most 3 % longer.
CLUSTER = 2
# Bytes of shared memory: a block's most; results and two barriers; a block of K, its scales and two barriers.
_MOST = 232448
_RESULTS = TILE_M * TILE_N * 2 + 16
_STAGE = (TILE_M + TILE_N) * BLOCK + TILE_M * 4 + 16
STAGES = (_MOST - _RESULTS) // _STAGE  # blocks of K there
SHARED_BYTES = _RESULTS + STAGES * _STAGE


class Form(NamedTuple):
    """What is compiled by itself.

    Attributes:
        bias: whether a bias is added.
        add: whether a matrix is; not with a bias.
        cluster: blocks of a cluster, 1 or 2.
    """

    bias: bool = False
    add: bool = False
    cluster: int = CLUSTER

    def macros(self) -> hopper.Macros:
        """The macros of hopper_gemm.cu."""
        return (
            ("BIAS", int(self.bias)),
            ("ADD", int(self.add)),
            ("CLUSTER", self.cluster),
            ("STAGES", STAGES),
            ("LOADER_REGISTERS", LOADER_REGISTERS),
            ("MULTIPLIER_REGISTERS", MULTIPLIER_REGISTERS),
        )


class _Arguments(ctypes.Structure):
    """`struct Arguments` of the source; tensor maps make its size a multiple of 64."""

    _fields_ = [
        *((name, ctypes.c_uint8 * 128) for name in ("x", "x_scales", "w", "d", "addend")),
        *((name, ctypes.c_void_p) for name in ("w_scales", "bias")),
        *((name, ctypes.c_int) for name in ("w_stride", "w_rows", "blocks", "tiles_m", "tiles_n")),
        ("rest", ctypes.c_uint8 * 28),
    ]


class Map(NamedTuple):
    """What `cuTensorMapEncodeTiled` makes a tensor map of: a matrix, and the box that a copy takes of it.

    Attributes:
        address: of the first element; a multiple of 16.
        element: bytes of one: 1 (uint8), 2 (BF16) or 4 (FP32).
        columns, rows: of the matrix.
        stride: bytes from row to row, a multiple of 16.
        box_columns, box_rows: at most 256 each.
        swizzle: whether rows of a box, 128 bytes then, are swizzled in shared memory.
    """

    address: int
    element: int
    columns: int
    rows: int
    stride: int
    box_columns: int
    box_rows: int
    swizzle: bool


# Numbers of cuda.h: CU_TENSOR_MAP_DATA_TYPE_*, _SWIZZLE_128B, _L2_PROMOTION_L2_256B.
_TYPES = {1: 0, 2: 9, 4: 7}
_SWIZZLE_128B, _PROMOTE_256B = 3, 3


def encode(wanted: Map) -> bytes:
    """Return the tensor map, 128 bytes.

    Raises:
        CudaError: the driver refuses it.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    room = (ctypes.c_uint8 * (128 + 64))()
    start = -ctypes.addressof(room) % 64
    map_ = ctypes.c_void_p(ctypes.addressof(room) + start)
    u32, u64 = ctypes.c_uint32, ctypes.c_uint64
    code = driver.cuTensorMapEncodeTiled(
        map_, _TYPES[wanted.element], u32(2), ctypes.c_void_p(wanted.address),
        (u64 * 2)(wanted.columns, wanted.rows), (u64 * 1)(wanted.stride),
        (u32 * 2)(wanted.box_columns, wanted.box_rows), (u32 * 2)(1, 1),
        0, _SWIZZLE_128B if wanted.swizzle else 0, _PROMOTE_256B, 0,
    )  # fmt: skip
    if code:
        raise nvrtc.CudaError(f"cuTensorMapEncodeTiled: error {code} for {wanted}")
    return bytes(room[start : start + 128])


def unfit(
    x: Operand, w: Operand, out: Tensor, bias: Tensor | None = None, add: Tensor | None = None
) -> str | None:
    """Say why the kernel does not make `out` of these, in a clause; None if it does.

    Arguments are those of `matmul`.
    """
    (m, k), (n, columns) = x.codes.shape, w.codes.shape
    if columns != k or tuple(out.shape) != (m, n):
        return f"[{m}, {k}] and [{n}, {columns}] do not make {list(out.shape)}"
    if any(size == 0 or size % BLOCK for size in (m, n, k)):
        return f"M {m}, N {n} and K {k} are not all multiples of {BLOCK}"
    if out.dtype is not torch.bfloat16:
        return f"the result is {out.dtype}"
    if bias is not None and (add is not None or bias.dtype is not torch.bfloat16):
        return "a bias and a matrix are added" if add is not None else f"the bias is {bias.dtype}"
    if add is not None and (add.shape != out.shape or add.dtype is not out.dtype):
        return f"{add.dtype} {list(add.shape)} is added to {out.dtype} {list(out.shape)}"
    given = (x.codes, x.scale_inv, w.codes, w.scale_inv, out, add)
    parts = [part for part in given if part is not None]
    if not all(part.is_contiguous() for part in (*parts, *([] if bias is None else [bias]))):
        return "a tensor is not contiguous"
    if any(part.data_ptr() % 16 for part in parts):  # what TMA copies
        return "an address is not a multiple of 16"
    if bias is not None and bias.data_ptr() % 4:
        return "the bias' address is not a multiple of 4"
    return None


def suits(k: int) -> bool:
    """Whether this kernel is as fast as cuBLASLt for products over K, or faster; the longer K the less.

    A rule and no measurement at run time: a resumed run multiplies as before.
    """
    return k <= 24576


class _Problem(NamedTuple):
    """A product: addresses, 0 for what there is not, and sizes."""

    x: int
    x_scales: int
    w: int
    w_scales: int
    out: int
    bias: int
    add: int
    m: int
    n: int
    k: int
    x_stride: int  # elements from row to row of the scales
    w_stride: int


@functools.lru_cache(maxsize=4096)
def _arguments(of: _Problem, form: Form) -> _Arguments:
    """The kernel's arguments; training meets the same addresses again and again."""
    m, n, k = of.m, of.n, of.k
    made = _Arguments(w_scales=of.w_scales, bias=of.bias, w_stride=of.w_stride)
    made.w_rows, made.blocks = n // BLOCK, k // BLOCK
    made.tiles_m, made.tiles_n = -(-m // TILE_M), -(-n // (TILE_N * form.cluster))
    result = Map(of.out, 2, n, m, 2 * n, 64, TILE_M // 2, True)
    maps = {
        "x": Map(of.x, 1, k, m, k, BLOCK, TILE_M // form.cluster, True),
        "x_scales": Map(of.x_scales, 4, m, k // BLOCK, 4 * of.x_stride, TILE_M, 1, False),
        "w": Map(of.w, 1, k, n, k, BLOCK, TILE_N, True),
        "d": result,
    }
    if form.add:
        maps["addend"] = result._replace(address=of.add)
    for name, wanted in maps.items():
        getattr(made, name)[:] = encode(wanted)
    return made


def compile_kernel(form: Form) -> bytes:
    """Return the cubin; needs no GPU."""
    return hopper.compile_kernel(FILE, form.macros(), ("hopper.cuh", "hopper_async.cuh"))


@functools.cache
def _kernel(device: int, form: Form) -> Any:
    with torch.cuda.device(device):
        return nvrtc.Kernel(compile_kernel(form), ENTRY, SHARED_BYTES)


def matmul(
    x: Operand,
    w: Operand,
    out: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    cluster: int = CLUSTER,
) -> Tensor:
    """Write x w^T (+ bias, + add) into `out` and return it; `unfit` has been asked.

    Sums 128 of K on the tensor cores, then in FP32, in the order of K: the same bits every time.

    Args:
        x: codes `[M, K]`, scales of 1x128.
        w: codes `[N, K]`, scales of 128x128.
        out: `[M, N]` BF16.
        bias: `[N]` BF16, added in FP32, before the rounding; not with `add`.
        add: `[M, N]` BF16, added likewise.
        cluster: blocks of a cluster; the result's bits do not depend on it.

    Raises:
        CudaError: the kernel does not compile or start here.
    """
    problem = _Problem(
        x.codes.data_ptr(),
        x.scale_inv.data_ptr(),
        w.codes.data_ptr(),
        w.scale_inv.data_ptr(),
        out.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if add is None else add.data_ptr(),
        *(x.codes.shape[0], w.codes.shape[0], x.codes.shape[1]),
        *(x.scale_inv.stride(0), w.scale_inv.stride(0)),
    )
    form = Form(bias is not None, add is not None, cluster)
    made = _arguments(problem, form)
    device = out.device.index
    clusters = min(made.tiles_m * made.tiles_n, support.processors(out.device) // cluster)
    hopper.launch(_kernel(device, form), device, (clusters * cluster, 1), THREADS, made)
    return out


def is_for(device: int) -> bool:
    """Whether this GPU's products may be made here; a warning says why not, once, unless the user said so."""
    if os.environ.get(VARIABLE) == "cublaslt":
        return False
    gap = reason(device)
    if gap is not None:
        warnings.warn(f"cuBLASLt makes the FP8 products: {gap}", stacklevel=3)
    return gap is None


@functools.cache
def reason(device: int) -> str | None:
    """Say why the kernel is not for this GPU, in a clause; None if it runs and is right."""
    if not support.is_hopper(device):
        return "not a Hopper GPU"
    try:
        return failure(torch.device("cuda", device))
    except (nvrtc.CudaError, OSError, AttributeError) as error:
        return str(error)


def failure(device: torch.device) -> str | None:
    """Make small products; say that one is wrong, in a clause, or return None."""
    generator = torch.Generator(device).manual_seed(0)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device).bfloat16()

    x = cast.cast_1x128(random(384, 640), "power_of_two", columns=False)
    w = cast.cast_128x128(random(640, 640), "power_of_two", columns=False)
    assert x.rows is not None and w.rows is not None
    product = x.quantized().dequantize().double() @ w.quantized().dequantize().double().t()
    past, bias = random(384, 640), random(1, 640)[0]
    for name, more, want in (
        ("the product", {}, product),
        ("the product with a bias", {"bias": bias}, product + bias),
        ("the product with a matrix", {"add": past}, product + past),
    ):
        out = torch.empty(384, 640, dtype=torch.bfloat16, device=device)
        wrong = self_check.verdict(name, matmul(x.rows, w.rows, out, **more), want, self_check.BF16)
        if wrong:
            return wrong
    return None
