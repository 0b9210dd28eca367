"""Time every algorithm that cuBLASLt offers for the weight gradients of Qwen2.5-1.5B, on a Hopper GPU.

python gemm_offers.py [TOKENS]      (16384)
"""

import sys
from functools import partial

import torch

from megatron_fp8_ext.benchmark import kernels, timing
from megatron_fp8_ext.kernels import cublaslt
from megatron_fp8_ext.kernels.cast import cast_1x128

tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 16384
torch.manual_seed(0)


def operand(columns):
    """A cast of random values, for the product over tokens."""
    values = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    return cast_1x128(values, "power_of_two").columns


for name, n, k in kernels.SHAPES["qwen2.5-1.5b"].linears():
    x, dy, out = operand(k), operand(n), torch.zeros(n, k, device="cuda")
    plan = cublaslt._plan(cublaslt.problem_of(x, dy, False, out), 0)
    first = None
    for algorithm in plan.offers(64):
        spread = timing.measure(partial(cublaslt.run, plan, x, dy, out, None, algorithm), 6.0, 1)
        first = out.clone() if first is None else first
        bits = "the same bits" if torch.equal(out, first) else "other bits"
        rate = 2 * tokens * n * k / spread.median / 1e9
        print(
            f"{name} tile {cublaslt.tile(algorithm)}: {spread.median:.4f} ms, {rate:.0f} TFLOP/s, {bits}"
        )
