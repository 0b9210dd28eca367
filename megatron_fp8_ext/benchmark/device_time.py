"""Where a training step's device time goes: kernels of one step, by what they do."""

from __future__ import annotations

import re

# In this order: the first that is found in a kernel's name (torch 2.9 to 2.13, TransformerEngine 2.20,
# cuDNN 9, cuBLAS 13). What none of them knows is "other", and the record has every name.
GROUPS = (
    ("communication", r"nccl"),
    ("attention", r"cudnn|fmha|flash|sdpa|fused_attn"),
    ("GEMM, FP8", r"nvjet_sm90_q|gemm.*e4m3|block_scaled_gemm"),
    ("GEMM, BF16", r"nvjet|gemm|gemv|splitK|cutlass"),
    (
        "optimizer",
        r"multi_tensor|[aA]dam|partial_cast|partial_compute|compute_partial|LpNorm|NormTwo",
    ),
    ("cross-entropy", r"_statistics_kernel|_gradient_kernel|cross_entropy|log_softmax"),
    ("rotation", r"rotate_qkv|rope"),
    (
        "casts, with norm or SwiGLU",
        r"cast_tiles|rmsnorm_rows|_cast|quantize|block_scaled|transpose_optim",
    ),
    ("norms", r"rmsnorm|layer_?norm"),
    ("SwiGLU", r"silu|swiglu"),
    ("sums, copies, fills", r"at::native|at_cuda|cub|Memset|Memcpy|triton_"),
)
OTHER = "other"
LABELS = (*(label for label, _ in GROUPS), OTHER)
Kernel = tuple[str, float, int]  # name, milliseconds, calls


def group(name: str) -> str:
    """Return what a kernel does, by its name."""
    return next((label for label, pattern in GROUPS if re.search(pattern, name)), OTHER)


def by_group(kernels: list[Kernel]) -> dict[str, tuple[float, int]]:
    """Return milliseconds and calls of each group that occurs, in the order of LABELS."""
    sums: dict[str, tuple[float, int]] = {}
    for name, ms, calls in kernels:
        label = group(name)
        before = sums.get(label, (0.0, 0))
        sums[label] = (before[0] + ms, before[1] + calls)
    return {label: sums[label] for label in LABELS if label in sums}


def markdown(sides: list[tuple[str, list[Kernel]]]) -> str:
    """Return the groups of each side as a table, and below it the kernels that take 1 ms or more."""
    grouped = [by_group(kernels) for _, kernels in sides]
    labels = [label for label in LABELS if any(label in g for g in grouped)]
    lines = [
        "Device time of one step after those that were timed, optimizer inside, ms (kernels)",
        "",
        "| | " + " | ".join(name for name, _ in sides) + " |",
        "|---|" + "---|" * len(sides),
    ]
    for label in labels:
        cells = [f"{g[label][0]:.1f} ({g[label][1]})" if label in g else "" for g in grouped]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    totals = [f"{sum(ms for ms, _ in g.values()):.1f}" for g in grouped]
    lines.append("| all | " + " | ".join(totals) + " |")
    for name, kernels in sides:
        lines += ["", f"{name}:", "", "| ms | calls | kernel | |", "|---|---|---|---|"]
        for kernel, ms, calls in kernels:
            if ms >= 1.0:
                short = kernel if len(kernel) <= 100 else kernel[:97] + "..."
                lines.append(f"| {ms:.2f} | {calls} | `{short}` | {group(kernel)} |")
    return "\n".join(lines) + "\n"
