"""cuBLASLt's block-scaled FP8 product, called directly.

TransformerEngine makes the same call, but asks cuBLASLt's heuristic for an algorithm at every product and
takes its first offer. Here it is asked once for a shape, its offers are read (`preferred`), and a residual
can be added in the product. Needs cuBLAS 12.9 and a Hopper GPU; `MEGATRON_FP8_EXT_GEMM=te` leaves the
products to TransformerEngine, as is done where cuBLASLt cannot be called; `cublaslt` gives it also those
that `hopper_gemm` makes otherwise.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_fp8_ext.kernels import support
from megatron_fp8_ext.kernels.cast import Operand

VARIABLE = "MEGATRON_FP8_EXT_GEMM"
WORKSPACE_BYTES = 32 * 2**20  # what cuBLAS asks for on Hopper, and TransformerEngine gives

# Numbers of cublasLt.h and library_types.h.
_COMPUTE_32F, _R_32F, _R_16BF, _R_8F_E4M3 = 68, 0, 14, 28
_TRANSA, _EPILOGUE, _BIAS_POINTER, _BIAS_TYPE = 3, 7, 8, 26
_A_SCALE, _B_SCALE, _FAST_ACCUM, _A_SCALE_MODE, _B_SCALE_MODE = 17, 18, 25, 31, 32
_VEC128, _BLK128X128 = 4, 5
_OP_T, _EPILOGUE_BIAS = 1, 4
_PREFER_WORKSPACE, _PREFER_ALIGNMENT_A = 1, 5
_CONFIG_TILE, _TILE_192X64 = 1, 208
_OFFERS = 8
_TYPES = {torch.bfloat16: _R_16BF, torch.float32: _R_32F}


class CublasError(RuntimeError):
    """cuBLASLt refused; the message names the call and its status."""


class Problem(NamedTuple):
    """What an algorithm is chosen for: D = B A^T, `[n, m]`.

    Attributes:
        m, n: rows of A and of B.
        k: columns of both.
        square: A has scales of 128x128 blocks (a weight), not 1x128.
        dtype: of D.
        accumulate: D is added to, or another matrix is to the product.
        bias: one BF16 value for each row of A is added.
        alignment: of the pointers to A, B and D (and what is added to it), bytes, at most 256.
    """

    m: int
    n: int
    k: int
    square: bool
    dtype: torch.dtype
    accumulate: bool
    bias: bool
    alignment: tuple[int, int, int]


class _Algorithm(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64 * 8)]


class _Result(ctypes.Structure):
    _fields_ = [
        ("algorithm", _Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


@functools.cache
def _library() -> Any:
    major = str(torch.version.cuda).split(".")[0]
    # PyDLL: the calls are short, and letting the GIL go would only let another thread in between them.
    library = ctypes.PyDLL(f"libcublasLt.so.{major}")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.cublasLtMatmul.argtypes = [*[pointer] * 14, size, pointer]
    library.cublasLtMatmulDescSetAttribute.argtypes = [pointer, ctypes.c_int, pointer, size]
    library.cublasLtMatrixLayoutCreate.argtypes = [
        pointer, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64,
    ]  # fmt: skip
    library.cublasLtMatmulAlgoGetHeuristic.argtypes = [
        *[pointer] * 7, ctypes.c_int, pointer, pointer,
    ]  # fmt: skip
    library.cublasLtMatmulPreferenceSetAttribute.argtypes = [pointer, ctypes.c_int, pointer, size]
    library.cublasLtMatmulAlgoConfigGetAttribute.argtypes = [
        pointer, ctypes.c_int, pointer, size, pointer,
    ]  # fmt: skip
    return library


def _check(call: str, code: int) -> None:
    if code:
        library = _library()
        library.cublasLtGetStatusString.restype = ctypes.c_char_p
        library.cublasLtGetStatusString.argtypes = [ctypes.c_int]
        raise CublasError(f"{call}: {library.cublasLtGetStatusString(code).decode()} ({code})")


@functools.cache
def _handle(device: int) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_blas_handle()  # the context, current in this thread
        _check("cublasLtCreate", _library().cublasLtCreate(ctypes.byref(handle)))
    return handle


@functools.cache
def _workspace(device: int, stream: int) -> Tensor:
    """A product's scratch space: one for a stream, whose products follow each other."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=f"cuda:{device}")


class _Plan:
    """Descriptors and algorithm for one problem in one thread, which alone sets their pointers."""

    def __init__(self, problem: Problem, device: int) -> None:
        library = _library()
        self.problem, self.handle = problem, _handle(device)
        self.description = ctypes.c_void_p()
        _check(
            "cublasLtMatmulDescCreate",
            library.cublasLtMatmulDescCreate(ctypes.byref(self.description), _COMPUTE_32F, _R_32F),
        )
        integer = ctypes.c_int32
        self._set(_TRANSA, integer(_OP_T))
        self._set(_A_SCALE_MODE, integer(_BLK128X128 if problem.square else _VEC128))
        self._set(_B_SCALE_MODE, integer(_VEC128))
        self._set(_FAST_ACCUM, ctypes.c_int8(0))
        if problem.bias:
            self._set(_EPILOGUE, integer(_EPILOGUE_BIAS))
            self._set(_BIAS_TYPE, integer(_R_16BF))
        self.a = self._layout(_R_8F_E4M3, problem.k, problem.m)
        self.b = self._layout(_R_8F_E4M3, problem.k, problem.n)
        self.d = self._layout(_TYPES[problem.dtype], problem.m, problem.n)
        self.alpha = ctypes.c_float(1.0)
        self.beta = ctypes.c_float(1.0 if problem.accumulate else 0.0)
        self.pointer = ctypes.c_void_p()
        self.by_pointer = ctypes.byref(self.pointer)
        # The heuristic refuses block scales without an address; `run` sets the real ones.
        somewhere = _workspace(device, torch._C._cuda_getCurrentRawStream(device)).data_ptr()
        for attribute in (_A_SCALE, _B_SCALE, *([_BIAS_POINTER] if problem.bias else [])):
            self.point(attribute, somewhere)
        offers = self.offers(_OFFERS)
        self.algorithm = offers[preferred([tile(offer) for offer in offers])]

    def _set(self, attribute: int, value: Any) -> None:
        _check(
            f"cublasLtMatmulDescSetAttribute {attribute}",
            _library().cublasLtMatmulDescSetAttribute(
                self.description, attribute, ctypes.byref(value), ctypes.sizeof(value)
            ),
        )

    def point(self, attribute: int, address: int) -> None:
        """Set one of the description's pointers."""
        self.pointer.value = address
        if _library().cublasLtMatmulDescSetAttribute(
            self.description, attribute, self.by_pointer, 8
        ):
            raise CublasError(f"cublasLtMatmulDescSetAttribute {attribute}")

    def _layout(self, dtype: int, rows: int, columns: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        _check(
            "cublasLtMatrixLayoutCreate",
            _library().cublasLtMatrixLayoutCreate(ctypes.byref(layout), dtype, rows, columns, rows),
        )
        return layout

    def offers(self, most: int) -> list[_Algorithm]:
        """Return what the heuristic offers, best first; at least one.

        Raises:
            CublasError: it offers nothing.
        """
        library = _library()
        preference = ctypes.c_void_p()
        _check(
            "cublasLtMatmulPreferenceCreate",
            library.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)),
        )
        try:
            wishes: list[tuple[int, Any]] = [(_PREFER_WORKSPACE, ctypes.c_uint64(WORKSPACE_BYTES))]
            a, b, d = self.problem.alignment
            for place, bytes_ in enumerate((a, b, d, d)):
                wishes.append((_PREFER_ALIGNMENT_A + place, ctypes.c_uint32(bytes_)))
            for attribute, value in wishes:
                _check(
                    f"cublasLtMatmulPreferenceSetAttribute {attribute}",
                    library.cublasLtMatmulPreferenceSetAttribute(
                        preference, attribute, ctypes.byref(value), ctypes.sizeof(value)
                    ),
                )
            results, count = (_Result * most)(), ctypes.c_int()
            code = library.cublasLtMatmulAlgoGetHeuristic(
                self.handle, self.description, self.a, self.b, self.d, self.d, preference,
                most, results, ctypes.byref(count),
            )  # fmt: skip
            _check("cublasLtMatmulAlgoGetHeuristic", code)
        finally:
            library.cublasLtMatmulPreferenceDestroy(preference)
        found = [result.algorithm for result in results[: count.value] if result.state == 0]
        if not found:
            raise CublasError(f"cublasLt has no algorithm for {self.problem}")
        return found


def tile(algorithm: _Algorithm) -> int:
    """Return the `cublasLtMatmulTile_t` of an offer; 0 where cuBLASLt does not tell."""
    found = ctypes.c_uint32()
    code = _library().cublasLtMatmulAlgoConfigGetAttribute(
        ctypes.byref(algorithm), _CONFIG_TILE, ctypes.byref(found), 4, None
    )
    return 0 if code else found.value


def preferred(tiles: Sequence[int]) -> int:
    """Return the place of the offer to take, of tiles in cuBLASLt's order: the first but for one tile.

    For the weight gradients of small matrices it offers 192x64 first, which is the slowest of its seven
    offers on an H200 (cuBLAS 13, 1536 x 2048 over 16384 tokens: 0.167 ms, the second 0.118). A rule and no
    measurement at run time, so that a resumed run takes the same algorithm: another order of sums may be
    another result.
    """
    return next((place for place, one in enumerate(tiles) if one != _TILE_192X64), 0)


_local = threading.local()


@functools.cache
def reason(device: int) -> str | None:
    """Say why cuBLASLt is not called here, in a clause; None if it is."""
    if os.environ.get(VARIABLE) == "te":
        return f"{VARIABLE}=te"
    if not support.is_hopper(device):
        return "not a Hopper GPU"
    try:
        _plan(Problem(128, 128, 128, True, torch.bfloat16, False, False, (256, 256, 256)), device)
    except (CublasError, OSError, AttributeError) as error:
        return str(error)
    return None


def _plan(problem: Problem, device: int) -> _Plan:
    plans = _local.__dict__.setdefault("plans", {})
    found: _Plan | None = plans.get((problem, device))
    if found is None:
        found = plans[(problem, device)] = _Plan(problem, device)
    return found


def _alignment(tensor: Tensor) -> int:
    address = tensor.data_ptr()
    return min(256, address & -address)


def problem_of(
    a: Operand,
    b: Operand,
    square: bool,
    out: Tensor,
    accumulate: bool = False,
    bias: Tensor | None = None,
    add: Tensor | None = None,
) -> Problem:
    """Return the problem of a call of `matmul`."""
    ends = min(_alignment(out), _alignment(out if add is None else add))
    return Problem(
        a.codes.shape[0],
        b.codes.shape[0],
        a.codes.shape[1],
        square,
        out.dtype,
        accumulate or add is not None,
        bias is not None,
        (_alignment(a.codes), _alignment(b.codes), ends),
    )


def matmul(
    a: Operand,
    b: Operand,
    square: bool,
    out: Tensor,
    accumulate: bool = False,
    bias: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """Write b a^T (+ bias) (+ add) into `out`, or add it, and return it.

    Args:
        a: codes `[m, k]`, with scales of 1x128, or of 128x128 if `square`.
        b: codes `[n, k]`, with scales of 1x128.
        square: see `a`.
        out: `[n, m]` BF16 or FP32, contiguous.
        accumulate: whether to add to `out`.
        bias: `[m]` BF16.
        add: `[n, m]` in `out`'s dtype, contiguous; added in FP32, before the rounding.

    Raises:
        CublasError: cuBLASLt cannot do it.
    """
    plan = _plan(problem_of(a, b, square, out, accumulate, bias, add), out.device.index)
    run(plan, a, b, out, bias, plan.algorithm, add)
    return out


def run(
    plan: _Plan,
    a: Operand,
    b: Operand,
    out: Tensor,
    bias: Tensor | None,
    algorithm: _Algorithm,
    add: Tensor | None = None,
) -> None:
    """Launch one product on torch's current stream."""
    device = out.device.index
    plan.point(_A_SCALE, a.scale_inv.data_ptr())
    plan.point(_B_SCALE, b.scale_inv.data_ptr())
    if bias is not None:
        plan.point(_BIAS_POINTER, bias.data_ptr())
    stream = torch._C._cuda_getCurrentRawStream(device)
    d = out.data_ptr()
    code = _library().cublasLtMatmul(
        plan.handle, plan.description, ctypes.byref(plan.alpha),
        a.codes.data_ptr(), plan.a, b.codes.data_ptr(), plan.b, ctypes.byref(plan.beta),
        d if add is None else add.data_ptr(), plan.d, d, plan.d,
        ctypes.byref(algorithm), _workspace(device, stream).data_ptr(), WORKSPACE_BYTES, stream,
    )  # fmt: skip
    _check("cublasLtMatmul", code)
