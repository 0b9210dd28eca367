"""Run hopper_gemm.cu on the CPU: its source, with functions for the asynchronous instructions of Hopper.

hopper_on_cpu.hpp and wgmma_on_cpu.hpp take the place of hopper_async.cuh. What this cannot show: that the PTX
in that file does what its functions are named for, that NVRTC and the GPU agree, and the tensor cores' own
sums (here FP32).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from importlib import resources

import cuda_on_cpu

from megatron_fp8_ext.kernels import hopper_gemm

LAUNCH = """
static Arguments given;
static void enter() { block_scaled_gemm(given); }
extern "C" const char *launch(const void *arguments, int grid, int threads, int cluster, long seed) {
  memcpy(&given, arguments, sizeof given);
  return launch_clusters(enter, grid, threads, cluster, seed);
}
extern "C" unsigned shared_bytes_used() { return SHARED_BYTES; }
extern "C" unsigned argument_bytes() { return sizeof(Arguments); }
"""


class Failure(AssertionError):
    """What an instruction said of its use; a race, or threads that wait for each other."""


def encode(wanted: hopper_gemm.Map) -> bytes:
    """A tensor map of `struct Map`, for `cuTensorMapEncodeTiled`'s."""
    return struct.pack("<Q7I", *wanted).ljust(128, b"\0")


def source(form: hopper_gemm.Form, change: Callable[[str], str]) -> str:
    """C++ of the kernel; `change` is a mutation of its text."""
    folder = resources.files("megatron_fp8_ext.kernels")
    shared, kernel = (
        folder.joinpath(name).read_text("utf-8") for name in ("hopper.cuh", hopper_gemm.FILE)
    )
    parts = [
        (cuda_on_cpu.HERE / "cuda_on_cpu.hpp").read_text(),
        *(f"#define {name} {value}" for name, value in form.macros()),
        cuda_on_cpu.without_ptx(shared),
        (cuda_on_cpu.HERE / "hopper_on_cpu.hpp").read_text(),
        (cuda_on_cpu.HERE / "wgmma_on_cpu.hpp").read_text(),
        cuda_on_cpu.without_ptx(change(kernel)),
        LAUNCH,
    ]
    return "\n".join(parts)


class Kernel:
    """As `nvrtc.Kernel`, on the CPU."""

    def __init__(
        self,
        form: hopper_gemm.Form,
        seed: int = 0,
        change: Callable[[str], str] = lambda text: text,
    ) -> None:
        self._library = cuda_on_cpu.library(source(form, change))
        self._library.launch.restype = ctypes.c_char_p
        self._cluster, self._seed = form.cluster, seed
        assert self._library.shared_bytes_used() == hopper_gemm.SHARED_BYTES
        assert self._library.argument_bytes() == ctypes.sizeof(hopper_gemm._Arguments)

    def __call__(self, grid: tuple[int, int], threads: int, arguments: ctypes.Structure) -> None:
        """Raises: Failure."""
        wrong = self._library.launch(
            ctypes.byref(arguments),
            grid[0],
            threads,
            self._cluster,
            ctypes.c_long(self._seed),
        )
        if wrong:
            raise Failure(wrong.decode())
