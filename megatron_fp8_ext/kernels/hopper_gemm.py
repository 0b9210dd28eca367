"""x w^T in block-scaled FP8 by a kernel of our own for Hopper (`hopper_gemm.cu`), where K is short.

Not run on a GPU yet: it compiles, and its source is run on the CPU by tests. So nobody gets it unasked;
`MEGATRON_FP8_EXT_GEMM=own` does (`te_gemm`), for products that it fits, once it has made a small one right.
What it should gain, on an H200 with 16384 tokens: fc1's product of Qwen2.5-1.5B (N 17920, K 1536) takes
cuBLASLt 0.749 ms and DeepGEMM, whose plan is like this one's, 0.664 ms, with the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_fp8_ext.fp8.reference import BLOCK
from megatron_fp8_ext.kernels import cast, cublaslt, hopper, nvrtc, self_check, support
from megatron_fp8_ext.kernels.cast import Operand

FILE, ENTRY = "hopper_gemm.cu", "block_scaled_gemm"
THREADS = 384  # two warpgroups multiply, one loads
# What a block's 384 threads are launched with, 168 each, shared out: 128 x 40 + 256 x 232.
LOADER_REGISTERS, MULTIPLIER_REGISTERS = 40, 232


class Tiling(NamedTuple):
    """How the product is cut.

    Attributes:
        tile_m: rows of a block's tile, 128 or 256; it has 128 columns.
        below: blocks of a cluster below each other, which share rows of `w`.
        beside: blocks of a cluster beside each other, which share rows of `x`; at most one of both is 2.
        stages: blocks of K in shared memory.
    """

    tile_m: int
    below: int
    beside: int
    stages: int

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.below * self.beside

    def shared(self) -> int:
        """Bytes of shared memory: `SHARED_BYTES` of the source."""
        stage = (self.tile_m + BLOCK) * BLOCK + self.tile_m * 4 + 16
        return self.tile_m * BLOCK * 2 + self.stages * stage

    def macros(self) -> hopper.Macros:
        """The macros of hopper_gemm.cu."""
        return (
            ("TILE_M", self.tile_m),
            ("CLUSTER_M", self.below),
            ("CLUSTER_N", self.beside),
            ("STAGES", self.stages),
            ("LOADER_REGISTERS", LOADER_REGISTERS),
            ("MULTIPLIER_REGISTERS", MULTIPLIER_REGISTERS),
        )


# The first is the default: its square clusters read the fewest bytes from the L2 cache.
TILINGS = {
    "256x128, two beside": Tiling(256, 1, 2, 3),
    "256x128, two below": Tiling(256, 2, 1, 3),
    "256x128, alone": Tiling(256, 1, 1, 3),
    "128x128, two below": Tiling(128, 2, 1, 5),
    "128x128, alone": Tiling(128, 1, 1, 5),
}
TILING = next(iter(TILINGS.values()))


class _Arguments(ctypes.Structure):
    """`struct Arguments` of the source; tensor maps make its size a multiple of 64."""

    _fields_ = [
        *((name, ctypes.c_uint8 * 128) for name in ("x", "x_scales", "w", "d")),
        ("w_scales", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("w_stride", "w_rows", "blocks", "tiles_m", "tiles_n")),
        ("rest", ctypes.c_uint8 * 36),
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


def unfit(x: Operand, w: Operand, out: Tensor) -> str | None:
    """Say why the kernel does not make `out` of these, in a clause; None if it does.

    Args:
        x: codes `[M, K]`, scales of 1x128.
        w: codes `[N, K]`, scales of 128x128.
        out: `[M, N]`.
    """
    (m, k), (n, columns) = x.codes.shape, w.codes.shape
    if columns != k or tuple(out.shape) != (m, n):
        return f"[{m}, {k}] and [{n}, {columns}] do not make {list(out.shape)}"
    if any(size == 0 or size % BLOCK for size in (m, n, k)):
        return f"M {m}, N {n} and K {k} are not all multiples of {BLOCK}"
    if out.dtype is not torch.bfloat16:
        return f"the result is {out.dtype}"
    parts = (x.codes, x.scale_inv, w.codes, w.scale_inv, out)
    if not all(part.is_contiguous() for part in parts):
        return "a tensor is not contiguous"
    if any(part.data_ptr() % 16 for part in parts):
        return "an address is not a multiple of 16"
    return None


@functools.lru_cache(maxsize=1024)
def _arguments(
    addresses: tuple[int, ...], size: tuple[int, int, int], strides: tuple[int, int], tiling: Tiling
) -> _Arguments:
    """The kernel's arguments; training meets the same addresses again and again.

    Args:
        addresses: of x's codes and scales, w's codes and scales, and D.
        size: M, N, K.
        strides: of the rows of both scales, elements.
        tiling: how the product is cut.
    """
    (x, x_scales, w, w_scales, d), (m, n, k) = addresses, size
    tile_m, below, beside, _ = tiling
    made = _Arguments(w_scales=w_scales, w_stride=strides[1], w_rows=n // BLOCK, blocks=k // BLOCK)
    made.tiles_m, made.tiles_n = -(-m // (tile_m * below)), -(-n // (BLOCK * beside))
    for name, wanted in (
        ("x", Map(x, 1, k, m, k, BLOCK, tile_m // beside, True)),
        ("x_scales", Map(x_scales, 4, m, k // BLOCK, 4 * strides[0], tile_m, 1, False)),
        ("w", Map(w, 1, k, n, k, BLOCK, BLOCK // below, True)),
        ("d", Map(d, 2, n, m, 2 * n, 64, tile_m // 2, True)),
    ):
        getattr(made, name)[:] = encode(wanted)
    return made


def compile_kernel(tiling: Tiling) -> bytes:
    """Return the cubin; needs no GPU."""
    return hopper.compile_kernel(FILE, tiling.macros(), ("hopper.cuh", "hopper_async.cuh"))


@functools.cache
def _kernel(device: int, tiling: Tiling) -> Any:
    with torch.cuda.device(device):
        return nvrtc.Kernel(compile_kernel(tiling), ENTRY, tiling.shared())


def matmul(x: Operand, w: Operand, out: Tensor, tiling: Tiling = TILING) -> Tensor:
    """Write x w^T into `out` and return it; `unfit` has been asked.

    Sums 128 of K on the tensor cores, then in FP32, in the order of K: the same bits every time.

    Args:
        x: codes `[M, K]`, scales of 1x128.
        w: codes `[N, K]`, scales of 128x128.
        out: `[M, N]` BF16.
        tiling: how the product is cut; the result's bits do not depend on it.

    Raises:
        CudaError: the kernel does not compile or start here.
    """
    made = _arguments(
        tuple(part.data_ptr() for part in (*x, *w, out)),
        (x.codes.shape[0], w.codes.shape[0], x.codes.shape[1]),
        (x.scale_inv.stride(0), w.scale_inv.stride(0)),
        tiling,
    )
    device = out.device.index
    clusters = min(made.tiles_m * made.tiles_n, support.processors(out.device) // tiling.cluster)
    found = _kernel(device, tiling)
    hopper.launch(found, device, (clusters * tiling.cluster, 1), THREADS, made)
    return out


def asked_for() -> bool:
    """Whether the environment asks for this kernel."""
    return os.environ.get(cublaslt.VARIABLE) == "own"


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
    """Make a small product; say that it is wrong, in a clause, or return None."""
    generator = torch.Generator(device).manual_seed(0)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device).bfloat16()

    x = cast.cast_1x128(random(384, 640), "power_of_two", columns=False)
    w = cast.cast_128x128(random(640, 640), "power_of_two", columns=False)
    assert x.rows is not None and w.rows is not None
    got = matmul(x.rows, w.rows, torch.empty(384, 640, dtype=torch.bfloat16, device=device))
    want = x.quantized().dequantize().double() @ w.quantized().dequantize().double().t()
    return self_check.verdict("the product", got, want, self_check.BF16)
