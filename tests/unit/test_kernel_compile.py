"""Every kernel compiles for Hopper with the Triton at hand; no GPU is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("torch")
pytest.importorskip("triton")

COMPILE = """
import itertools, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_fp8_ext.kernels import cast, rmsnorm, softmax, swiglu

FLAGS = ("ROWS", "COLUMNS", "SQUARE", "WHOLE", "KEEP", "RESIDUAL", "POWER_OF_TWO")
TYPES = {"row_codes": "*u8", "col_codes": "*u8", "codes": "*u8", "target": "*i64", "eps": "fp32",
         "first": "i32", "M": "i32", "K": "i32", "F": "i32", "H": "i32", "stride": "i32",
         "row_stride": "i32", "col_stride": "i32", "N": "i32", "V": "i32",
         "stash_codes": "*i8", "y_codes": "*u8", "y_stride": "i32"}
FP32 = ("row_scales", "col_scales", "scales", "rstd", "dweight", "largest", "total", "predicted",
        "lse", "dloss", "y_scales")
KERNELS = [cast._cast_kernel, swiglu._forward_kernel, swiglu._backward_kernel,
           swiglu._backward_straddling_kernel,
           rmsnorm._rows_kernel, rmsnorm._columns_kernel,
           rmsnorm._backward_kernel, softmax._statistics_kernel, softmax._gradient_kernel]
for kernel in KERNELS:
    for on in (True, False):
        signature, values = {}, {}
        for index, name in enumerate(kernel.arg_names):
            if name.isupper() and len(name) > 1:
                signature[name] = "constexpr"
                values[(index,)] = {"LARGEST": 3.3895313892515355e38, "WIDTH": 2048}.get(name, on)
                if name == "COLUMNS":
                    values[(index,)] = True
            else:
                signature[name] = TYPES.get(name) or ("*fp32" if name in FP32 else "*bf16")
        if on and "y_codes" in signature:
            signature["x"] = "*i8"  # a stash
        source = ASTSource(fn=kernel, signature=signature, constexprs=values)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert ".ftz" not in built.asm["ptx"], "flushing would change subnormals"
        print(kernel.__name__, on, len(built.asm["cubin"]))
"""


def test_kernels_compile_for_hopper(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    # A file: Triton reads a kernel's source, and its caller's stack.
    script = tmp_path / "build.py"
    script.write_text(COMPILE)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 18


@pytest.mark.parametrize("power_of_two", [True, False])
def test_cuda_kernels_compile_for_hopper(power_of_two):
    """NVRTC, as at run time; every kernel that the fused functions ask for, and the tests' KEEP."""
    nvrtc = pytest.importorskip("megatron_fp8_ext.kernels.nvrtc")
    from megatron_fp8_ext.kernels import hopper

    try:
        nvrtc._nvrtc()
    except nvrtc.CudaError as error:
        pytest.skip(str(error))
    for source in hopper.SOURCES:
        stash = power_of_two and "swiglu" in source
        macros = hopper.tile_macros(source, True, True, power_of_two, True, stash)
        assert hopper.compile_kernel("hopper_tiles.cu", macros)[:4] == b"\x7fELF"
    summed = hopper.tile_macros("plain", True, True, power_of_two, False, False, total=True)
    assert hopper.compile_kernel("hopper_tiles.cu", summed)[:4] == b"\x7fELF"
    for hidden in (896, 1536, hopper.MAX_HIDDEN):
        for backward in (False, True):
            macros = hopper.norm_macros(hidden, backward, power_of_two, not backward, backward)
            assert hopper.compile_kernel("hopper_norm.cu", macros)[:4] == b"\x7fELF"
        rope = hopper.rope_macros(128, bool(power_of_two))
        assert hopper.compile_kernel("hopper_rope.cu", rope)[:4] == b"\x7fELF"
    summed = hopper.compile_kernel(
        "hopper_sums.cu", hopper.sum_macros(power_of_two, not power_of_two)
    )
    assert summed[:4] == b"\x7fELF"
    with pytest.raises(nvrtc.CudaError, match=r"hopper_norm.cu.*error"):
        hopper.compile_kernel("hopper_norm.cu", (*macros, ("low", 1)))
