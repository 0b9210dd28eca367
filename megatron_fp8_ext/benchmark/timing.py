"""Device times by CUDA events, and the two limits they are held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Larger than any L2 cache: writing it between two runs leaves nothing of the first.
_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Time:
    """Milliseconds of one call.

    Attributes:
        median: over the repetitions.
        low: 10th percentile.
        high: 90th percentile.
        repetitions: how many.
    """

    median: float
    low: float
    high: float
    repetitions: int


def measure(call: Callable[[], object], budget_ms: float = 60.0, warm_up: int = 3) -> Time:
    """Time `call` with a cold L2 cache; arguments as `in_turns`'s."""
    return in_turns([call], budget_ms, warm_up)[0]


def in_turns(
    calls: Sequence[Callable[[], object]], budget_ms: float = 60.0, warm_up: int = 3
) -> list[Time]:
    """Time calls that are to be compared, one after the other in each round, with a cold L2 cache.

    A GPU at its power limit slows down as it gets warm: whoever came later would be the slower one.

    Args:
        calls: each launches work on the current stream; compiled by the warm-up.
        budget_ms: device time for each, between 5 and 200 repetitions, as many for all.
        warm_up: calls before the first that counts.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def rounds(count: int) -> list[list[float]]:
        events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
        for _ in range(count):
            for call, pairs in zip(calls, events, strict=True):
                flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                pairs.append((begin, end))
        torch.cuda.synchronize()
        return [[float(begin.elapsed_time(end)) for begin, end in pairs] for pairs in events]

    rounds(warm_up)
    guess = max(statistics.median(times) for times in rounds(3))
    count = int(min(200, max(5, budget_ms / max(guess, 1e-3))))
    found = []
    for times in map(sorted, rounds(count)):
        low, high = times[count // 10], times[-1 - count // 10]
        found.append(Time(statistics.median(times), low, high, repetitions=count))
    return found


def copy_rate() -> float:
    """TB/s of a device-to-device copy of 1 GiB, bytes read plus bytes written."""
    source = torch.randint(0, 255, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / measure(lambda: target.copy_(source)).median / 1e9


def gemm_rate(m: int = 8192, n: int = 8192, k: int = 8192) -> float:
    """TFLOP/s of torch's BF16 matrix product on random data."""
    a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    return 2 * m * n * k / measure(lambda: torch.mm(a, b.t())).median / 1e9


def peak_bytes(call: Callable[[], object]) -> int:
    """Bytes that `call` allocates above what was allocated before it, at its peak."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)
