"""Our FP8 product beside cuBLASLt's, in turns, and how fast each is at the power limit. Needs a Hopper GPU.

python docs/results/gemm_own.py qwen2.5-1.5b 16384
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from megatron_fp8_ext.kernels import cublaslt, hopper_gemm
from megatron_fp8_ext.kernels.cast import cast_1x128, cast_128x128

LAYERS = {  # N, K of QKV, projection, fc1, fc2
    "qwen2.5-1.5b": ((2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960)),
    "qwen2.5-7b": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
}
TERMS = {"qkv fprop": "bias", "proj fprop": "add", "fc2 fprop": "add"}
Calls = dict[str, Callable[[], object]]


def in_turns(calls: Calls, rounds: int = 16) -> dict[str, float]:
    """Medians in ms; a copy before each call empties the L2 cache and keeps the host ahead."""
    here = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    there, events = torch.empty_like(here), {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, call in calls.items():
            there.copy_(here)
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            if turn >= 3:
                events[name].append(pair)
        torch.cuda.synchronize()
    return {
        name: statistics.median(a.elapsed_time(b) for a, b in all_) for name, all_ in events.items()
    }


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
    for layer, (n, k) in zip(("qkv", "proj", "fc1", "fc2"), LAYERS[model], strict=True):
        for way, (rows, columns) in (("fprop", (n, k)), ("dgrad", (k, n))):
            x = cast_1x128(
                torch.randn(tokens, columns, device="cuda").bfloat16(),
                "power_of_two",
                columns=False,
            )
            w = cast_128x128(
                torch.randn(rows, columns, device="cuda").bfloat16(), "power_of_two", columns=False
            )
            out = torch.zeros(tokens, rows, dtype=torch.bfloat16, device="cuda")
            term = TERMS.get(f"{layer} {way}")
            more = {term: torch.zeros_like(out[0] if term == "bias" else out)} if term else {}
            calls = calls_of(x.rows, w.rows, out, **more)
            flops = 2 * tokens * rows * columns
            told = (
                f"{name} {ms:.3f} ms, {flops / ms / 1e9:.0f} TFLOP/s"
                for name, ms in in_turns(calls).items()
            )
            print(f"{layer} {way} {term or ''} N {rows} K {columns}: {'; '.join(told)}", flush=True)
            if f"{layer} {way}" == "fc1 fprop":
                for values in ("random", "zeros"):
                    for name in ("cuBLASLt", "ours"):
                        print(
                            f"  for a second, {values}, {name}: {sustained(calls[name])}",
                            flush=True,
                        )
                    x.rows.codes.zero_(), w.rows.codes.zero_()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
