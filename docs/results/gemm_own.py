"""Our FP8 product beside cuBLASLt's, in turns, and how fast each is at the power limit. Needs a Hopper GPU.

python docs/results/gemm_own.py qwen2.5-1.5b 16384
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from megatron_fp8_ext.benchmark import kernels, timing
from megatron_fp8_ext.kernels import cublaslt, hopper_gemm
from megatron_fp8_ext.kernels.cast import cast_1x128, cast_128x128

FORMAT = "power_of_two"
TERMS = {"qkv fprop": "bias", "proj fprop": "add", "fc2 fprop": "add"}
Calls = dict[str, Callable[[], object]]


def sustained(call: Callable[[], object], seconds: float = 1.2) -> str:
    """Milliseconds a call, then the last clock, power and reason for the clock that nvidia-smi told."""
    query = "clocks.sm,power.draw.instant,clocks_event_reasons.active"
    watch = [
        "nvidia-smi",
        "-i",
        "0",
        f"--query-gpu={query}",
        "--format=csv,noheader",
        "-lms",
        "100",
    ]
    with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as process:
        start, done = time.monotonic(), 0
        while time.monotonic() - start < seconds:
            for _ in range(20):
                call()
            torch.cuda.synchronize()
            done += 20
        milliseconds = (time.monotonic() - start) / done * 1e3
        process.terminate()
        told = process.communicate()[0].splitlines()
    return f"{milliseconds:.3f} ms, {told[-2] if len(told) > 1 else ''}"


def calls_of(x, w, out, **more) -> Calls:
    """The product of both operands by cuBLASLt, and by ours in clusters of two blocks and alone."""
    calls: Calls = {"cuBLASLt": partial(cublaslt.matmul, w, x, True, out, **more)}
    for name, cluster in (("ours", 2), ("ours, alone", 1)):
        calls[name] = partial(hopper_gemm.matmul, x, w, out, cluster=cluster, **more)
    return calls


def main(model: str, tokens: int) -> None:
    """Print a line for each product of a layer."""
    for layer, n, k in kernels.SHAPES[model].linears():
        for way, (rows, columns) in (("fprop", (n, k)), ("dgrad", (k, n))):
            product = f"{layer} {way}"
            x, w = (torch.randn(size, columns, device="cuda").bfloat16() for size in (tokens, rows))
            x, w = (
                cast_1x128(x, FORMAT, columns=False).rows,
                cast_128x128(w, FORMAT, columns=False).rows,
            )
            out = torch.zeros(tokens, rows, dtype=torch.bfloat16, device="cuda")
            term = TERMS.get(product)
            more = {term: torch.zeros_like(out[0] if term == "bias" else out)} if term else {}
            calls = calls_of(x, w, out, **more)
            told = []
            for name, time_ in zip(calls, timing.in_turns(list(calls.values())), strict=True):
                rate = 2 * tokens * rows * columns / time_.median / 1e9
                told.append(f"{name} {time_.median:.3f} ms, {rate:.0f} TFLOP/s")
            print(f"{product} {term or ''} N {rows} K {columns}: {'; '.join(told)}", flush=True)
            for values in ("random", "zeros") if product == "fc1 fprop" else ():
                for name in ("cuBLASLt", "ours"):
                    print(f"  for a second, {values}, {name}: {sustained(calls[name])}", flush=True)
                x.codes.zero_(), w.codes.zero_()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
