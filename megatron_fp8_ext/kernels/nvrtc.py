"""CUDA C++ compiled at run time for this GPU (NVRTC, which comes with torch), and its launch.

No compile step at install, no compiler on the machine. The launch takes all arguments as one struct: some
microseconds of Python, a fraction of what a Triton launch takes.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch

_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


class CudaError(RuntimeError):
    """NVRTC or the driver said no; the message is its own."""


def _nvrtc() -> ctypes.CDLL:
    """The library of torch's CUDA.

    Raises:
        CudaError: none was found.
    """
    major = str(torch.version.cuda).split(".")[0]
    name = f"libnvrtc.so.{major}"
    places = [name]
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        places += [str(path) for path in sorted(Path(folder).glob(f"*/lib/{name}"))]
    for place in places:
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise CudaError(f"no {name} found: torch's CUDA packages have it, or CUDA's own installation")


def compile_source(source: str, name: str, options: list[str]) -> bytes:
    """Return the cubin of CUDA C++ `source`; needs no GPU.

    Args:
        source: the text.
        name: its file name, for messages.
        options: of NVRTC, `--gpu-architecture=sm_90a` among them.

    Raises:
        CudaError: with the compiler's first error.
    """
    library = _nvrtc()
    program = ctypes.c_void_p()
    given = [option.encode() for option in options]

    def check(code: int) -> None:
        if code:
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise CudaError(f"NVRTC: {library.nvrtcGetErrorString(code).decode()}")

    check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), 0, None, None
        )
    )
    try:
        array = (ctypes.c_char_p * len(given))(*given)
        failed = library.nvrtcCompileProgram(program, len(given), array)
        size = ctypes.c_size_t()
        if failed:
            check(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            check(library.nvrtcGetProgramLog(program, log))
            lines = log.value.decode(errors="replace").splitlines()
            raise CudaError(next((line for line in lines if "error" in line), "NVRTC failed"))
        check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        check(library.nvrtcGetCUBIN(program, cubin))
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


class Kernel:
    """A kernel that takes one struct, loaded on the current device."""

    def __init__(self, cubin: bytes, name: str, shared: int = 0) -> None:
        """Load it; `shared` bytes of dynamic shared memory go with each launch."""
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._context = ctypes.c_void_p()
        device = torch.cuda.current_device()
        self._check(self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), device))
        # In a thread that never called CUDA's runtime, such as autograd's, none is current yet.
        self._check(self._driver.cuCtxSetCurrent(self._context))
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._cubin = cubin
        self._check(self._driver.cuModuleLoadData(ctypes.byref(self._module), cubin))
        self._check(
            self._driver.cuModuleGetFunction(
                ctypes.byref(self._function), self._module, name.encode()
            )
        )
        self._shared = shared
        if shared:
            # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, _PREFERRED_SHARED_MEMORY_CARVEOUT (percent)
            for attribute, value in ((8, shared), (9, 100)):
                self._check(self._driver.cuFuncSetAttribute(self._function, attribute, value))
        self._launch = self._driver.cuLaunchKernel
        unsigned, pointer = ctypes.c_uint, ctypes.c_void_p
        self._launch.argtypes = [pointer, *[unsigned] * 7, pointer, pointer, pointer]

    def _check(self, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise CudaError(f"CUDA: {(text.value or b'error').decode()} ({code})")

    def __call__(self, grid: tuple[int, int], threads: int, arguments: ctypes.Structure) -> None:
        """Launch on torch's current stream of the current device."""
        stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
        struct: Any = ctypes.c_void_p(ctypes.addressof(arguments))
        launch = functools.partial(
            self._launch,
            self._function,
            grid[0],
            grid[1],
            1,
            threads,
            1,
            1,
            self._shared,
            stream,
            ctypes.byref(struct),
            None,
        )
        code = launch()
        if code == _NO_CONTEXT:
            self._check(self._driver.cuCtxSetCurrent(self._context))
            code = launch()
        self._check(code)
