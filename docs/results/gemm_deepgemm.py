"""DeepGEMM's block-scaled products beside cuBLASLt's, on a Hopper GPU with nvcc.

pip install --no-deps sgl_deep_gemm==0.1.1 apache_tvm_ffi==0.1.9
DG_JIT_USE_NVRTC=0 python gemm_deepgemm.py [TOKENS]      (16384)
"""

import sys
from functools import partial

import deep_gemm
import torch

from megatron_fp8_ext.benchmark import timing
from megatron_fp8_ext.kernels import cublaslt
from megatron_fp8_ext.kernels.cast import cast_1x128, cast_128x128

tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 16384
torch.manual_seed(0)


def random(*size):
    """Normal values in BF16."""
    return torch.randn(size, device="cuda", dtype=torch.bfloat16)


def theirs(operand, square=False):
    """An operand as DeepGEMM takes it: codes and scales."""
    outer, inner = operand.codes.shape
    scales = operand.scale_inv if square else operand.scale_inv.t()
    scales = scales[: -(-outer // 128) if square else outer, : -(-inner // 128)]
    return operand.codes.view(torch.float8_e4m3fn), scales


for name, n, k in (
    ("fc1", 17920, 1536),
    ("fc2", 1536, 8960),
    ("qkv", 2048, 1536),
    ("proj", 1536, 1536),
):
    x, dy = (cast_1x128(random(tokens, size), "power_of_two") for size in (k, n))
    w = cast_128x128(random(n, k), "power_of_two")
    grads = [torch.zeros(n, k, device="cuda") for _ in range(2)]
    outs = [random(tokens, n) for _ in range(2)]
    deep = partial(deep_gemm.fp8_gemm_nt, disable_ue8m0_cast=True)
    a, b, recipe = theirs(x.rows), theirs(w.rows, True), (1, 128, 128)
    gradient = theirs(dy.columns), theirs(x.columns), grads[1]
    pairs = {
        "fprop": (
            partial(cublaslt.matmul, w.rows, x.rows, True, outs[0]),
            partial(deep, a, b, outs[1], c=None, recipe=recipe),
        ),
        "wgrad, added to FP32": (
            partial(cublaslt.matmul, x.columns, dy.columns, False, grads[0], True),
            partial(deep, *gradient, c=grads[1], recipe=(1, 1, 128)),
        ),
    }
    for what, calls in pairs.items():
        try:
            made = [timing.measure(call, 10.0).median for call in calls]
        except RuntimeError as error:  # fc2's fprop: DeepGEMM wants scales without padding
            print(name, what, str(error)[:200])
            continue
        theirs_and_ours = (
            f"{by} {ms:.4f} ms, {2 * tokens * n * k / ms / 1e9:.0f} TFLOP/s"
            for by, ms in zip(("cuBLASLt", "DeepGEMM"), made, strict=True)
        )
        same = torch.equal(*outs) if what == "fprop" else "not compared"
        print(f"{name} {what}: {'; '.join(theirs_and_ours)}; same bits: {same}")
