"""`megatron-fp8 bench kernels`: every kernel, its unfused counterpart, and their distance from the limit."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from megatron_fp8_ext.benchmark import timing
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.kernels import support


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one model's layer at one microbatch.

    Attributes:
        name: for the record.
        tokens: micro-batch size x sequence length.
        hidden: hidden size.
        ffn: FFN size.
        vocabulary: padded vocabulary size.
        kv: width of the keys (and of the values) over all groups.
    """

    name: str
    tokens: int
    hidden: int
    ffn: int
    vocabulary: int
    kv: int

    def linears(self) -> tuple[tuple[str, int, int], ...]:
        """(name, output features, input features) of a layer's linear layers."""
        return (
            ("qkv", self.hidden + 2 * self.kv, self.hidden),
            ("proj", self.hidden, self.hidden),
            ("fc1", 2 * self.ffn, self.hidden),
            ("fc2", self.hidden, self.ffn),
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="qwen2.5-1.5b", tokens=16384, hidden=1536, ffn=8960, vocabulary=151936, kv=256),
        Shape(name="qwen2.5-7b", tokens=8192, hidden=3584, ffn=18944, vocabulary=152064, kv=512),
    )
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    Attributes:
        kernel: what was done.
        by: whose implementation.
        time: milliseconds.
        bytes: what must move through device memory, each input read and each output written once.
        flops: operations of its matrix products; 0 where there are none.
        of_limit: fraction of the measured copy's rate (bytes) or the measured GEMM's (flops).
        peak_mb: peak of the memory it allocates, its results included; None where not taken.
        note: settings.
    """

    kernel: str
    by: str
    time: timing.Time
    bytes: int = 0
    flops: int = 0
    of_limit: float = 0.0
    peak_mb: float | None = None
    note: str = ""


Case = tuple[str, str, int, int, Callable[[], object], str]  # kernel, by, bytes, flops, call, note


def require_gpu() -> None:
    """Stop where there is nothing to measure.

    Raises:
        UserError: no GPU, or one on which the kernels do not run.
    """
    if support.interpreted():
        raise UserError("bench: TRITON_INTERPRET=1 runs kernels on the CPU; unset it to measure")
    if not torch.cuda.is_available():
        raise UserError("bench: torch sees no GPU here; run it on a Hopper GPU (H100, H200, H20)")
    reason = support.gap(torch.device("cuda"))
    if reason is not None:
        raise UserError(f"bench: the kernels cannot run: {reason}")


def run(
    shape: Shape,
    budget_ms: float = 60.0,
    sweep: bool = False,
    only: str = "",
    cases: Callable[[Shape, bool], Iterator[Case]] | None = None,
) -> dict[str, Any]:
    """Measure every kernel for one shape and return the record that is written as JSON.

    Args:
        shape: sizes.
        budget_ms: device time for each measurement.
        sweep: try several numbers of warps for each tile kernel.
        only: measure the kernels whose name contains this.
        cases: what to measure; None for the kernels.

    Raises:
        UserError: there is no GPU for it.
    """
    require_gpu()
    torch.manual_seed(1236)
    copy, gemm = timing.copy_rate(), timing.gemm_rate()
    rows: list[Row] = []
    # Those that follow each other under one name are compared, so they are measured in turns.
    for kernel, group in itertools.groupby(
        (cases or _cases)(shape, sweep), key=lambda case: case[0]
    ):
        if only not in kernel:
            continue
        compared = list(group)
        times = timing.in_turns([call for *_, call, _ in compared], budget_ms)
        for (_, by, moved, flops, call, note), time in zip(compared, times, strict=True):
            limit = flops / time.median / 1e9 / gemm if flops else moved / time.median / 1e9 / copy
            rows.append(
                Row(
                    kernel=kernel,
                    by=by,
                    time=time,
                    bytes=moved,
                    flops=flops,
                    of_limit=limit,
                    peak_mb=timing.peak_bytes(call) / 2**20,
                    note=note,
                )
            )
    return {
        "shape": asdict(shape),
        "device": torch.cuda.get_device_name(),
        "versions": _versions(),
        "copy_tb_s": copy,
        "bf16_gemm_tflop_s": gemm,
        "scale_format": "power_of_two",
        "rows": [asdict(row) for row in rows],
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in ("torch", "triton", "transformer-engine", "megatron-core", "megatron-fp8-ext"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cases(shape: Shape, sweep: bool) -> Iterator[Case]:
    yield from _cast_cases(shape, sweep)
    yield from _swiglu_cases(shape, sweep)
    yield from _norm_cases(shape, sweep)
    yield from _loss_cases(shape)


def _random(*size: int) -> Tensor:
    return torch.randn(size, device="cuda", dtype=torch.bfloat16)


def _warps(sweep: bool) -> tuple[int | None, ...]:
    return (None, 8, 16) if sweep else (None,)


def _by(warps: int | None) -> str:
    return "as in the layer" if warps is None else f"Triton, {warps} warps"


def _te_cast(x: Tensor, square: bool) -> Callable[[], object] | None:
    """TransformerEngine's cast of `x` in both directions; None where it is not installed."""
    from megatron_fp8_ext.megatron_plugin import te_tensor

    try:
        quantizer = te_tensor.quantizer("power_of_two", square)
    except (ImportError, OSError):
        return None
    return partial(quantizer, x)


def _cast_cases(shape: Shape, sweep: bool) -> Iterator[Case]:
    from megatron_fp8_ext.kernels import cast

    for width in (shape.hidden, shape.ffn):
        x = _random(shape.tokens, width)
        for rows, columns, name in ((1, 1, "both"), (1, 0, "rows"), (0, 1, "columns")):
            moved = x.numel() * (2 + rows + columns)
            for warps in _warps(sweep):
                call = partial(cast.cast_1x128, x, "power_of_two", bool(rows), bool(columns), warps)
                yield f"cast 1x128 {name}, K={width}", "ours", moved, 0, call, _by(warps)
        both = partial(cast.cast_1x128_and_sum, x, "power_of_two")
        yield f"cast 1x128 both + sum of columns, K={width}", "ours", x.numel() * 4, 0, both, ""
        te = _te_cast(x, False)
        if te is not None:
            yield f"cast 1x128 both, K={width}", "TE", x.numel() * 4, 0, te, ""
    w = _random(2 * shape.ffn, shape.hidden)
    for warps in _warps(sweep):
        call = partial(cast.cast_128x128, w, "power_of_two", warps=warps or cast.WARPS)
        yield "cast 128x128 both, fc1", "ours", w.numel() * 4, 0, call, _by(warps)
    te = _te_cast(w, True)
    if te is not None:
        yield "cast 128x128 both, fc1", "TE", w.numel() * 4, 0, te, ""


def _swiglu_cases(shape: Shape, sweep: bool) -> Iterator[Case]:
    from megatron_fp8_ext.kernels import swiglu

    x, dy = _random(shape.tokens, 2 * shape.ffn), _random(shape.tokens, shape.ffn)
    for warps in _warps(sweep):
        both = partial(swiglu.swiglu_cast, x, "power_of_two", warps=warps)
        yield "SwiGLU + cast", "ours", dy.numel() * 6, 0, both, _by(warps)
        late = partial(both, columns=False)
        yield "SwiGLU + cast rows", "ours", dy.numel() * 5, 0, late, _by(warps)
        stash = partial(late, stash=True)
        yield "SwiGLU + cast rows, stash", "ours", int(dy.numel() * 7.125), 0, stash, _by(warps)
    kept = swiglu.swiglu_cast(x, "power_of_two", columns=False, stash=True).stash
    for warps in _warps(sweep):
        note = _by(warps)
        backward = partial(swiglu.swiglu_backward_cast, dy, x, "power_of_two", warps=warps)
        yield "SwiGLU backward + cast", "ours", dy.numel() * 10, 0, backward, note
        again = partial(backward, y_columns=True)
        yield "SwiGLU backward + cast + y", "ours", dy.numel() * 11, 0, again, note
        of_stash = partial(swiglu.swiglu_backward_cast, dy, kept or x, "power_of_two", warps=warps)
        yield (
            "SwiGLU backward + cast of a stash",
            "ours",
            int(dy.numel() * 8.125),
            0,
            of_stash,
            note,
        )
        whole = partial(of_stash, y_columns=True)
        moved = int(dy.numel() * 9.125)
        yield "SwiGLU backward + cast of a stash + y", "ours", moved, 0, whole, note
    te_y, te_dx = _te_cast(dy, False), _te_cast(x, False)
    if te_y is None or te_dx is None:
        return
    from megatron_fp8_ext.megatron_plugin import te_tensor

    quantize_y, quantize_dx = te_y, te_dx

    def te_forward() -> None:
        te_tensor.swiglu(x)
        quantize_y()

    def te_backward() -> None:
        te_tensor.swiglu_backward(dy, x)
        quantize_dx()

    yield "SwiGLU + cast", "TE, two kernels", dy.numel() * 6, 0, te_forward, ""
    yield "SwiGLU backward + cast", "TE, two kernels", dy.numel() * 10, 0, te_backward, ""


def _norm_cases(shape: Shape, sweep: bool) -> Iterator[Case]:
    from megatron_fp8_ext.kernels import rmsnorm

    x, w = _random(shape.tokens, shape.hidden), _random(shape.hidden)
    dy, past = _random(shape.tokens, shape.hidden), _random(shape.tokens, shape.hidden)
    eps, n = 1e-6, x.numel()
    rstd = rmsnorm.rmsnorm_cast(x, w, eps, "power_of_two").rstd
    for rows, columns, name in ((1, 1, "both"), (1, 0, "rows")):
        call = partial(rmsnorm.rmsnorm_cast, x, w, eps, "power_of_two", columns=bool(columns))
        yield f"RMSNorm + cast {name}", "ours", n * (2 + rows + columns), 0, call, ""
    backward = partial(rmsnorm.rmsnorm_backward_cast, dy, x, w, rstd, "power_of_two", residual=past)
    yield "RMSNorm backward + residual + cast", "ours", n * 10, 0, backward, ""
    plain = partial(
        rmsnorm.rmsnorm_backward_cast, dy, x, w, rstd, "power_of_two", rows=False, columns=False
    )
    yield "RMSNorm backward", "ours", n * 6, 0, plain, ""
    yield "RMSNorm backward + residual", "ours", n * 8, 0, partial(plain, residual=past), ""
    for warps in _warps(sweep):
        late = partial(rmsnorm.rmsnorm_columns, x, w, rstd, "power_of_two", warps)
        yield "RMSNorm columns", "ours", n * 3, 0, late, _by(warps)


def _loss_cases(shape: Shape) -> Iterator[Case]:
    from megatron_fp8_ext.kernels.linear_cross_entropy import linear_cross_entropy

    hidden = _random(shape.tokens, 1, shape.hidden).requires_grad_()
    weight = (_random(shape.vocabulary, shape.hidden) * 0.02).requires_grad_()
    target = torch.randint(0, shape.vocabulary, (shape.tokens, 1), device="cuda")
    flops = 6 * shape.tokens * shape.hidden * shape.vocabulary

    def ours() -> object:
        loss = linear_cross_entropy(hidden, weight, target).mean()
        return torch.autograd.grad(loss, (hidden, weight))

    def plain() -> object:
        logits = torch.matmul(hidden, weight.t()).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        return torch.autograd.grad(loss, (hidden, weight))

    note = "FLOPs of three GEMMs"
    yield "head + loss, forward and backward", "ours, chunked", 0, flops, ours, note
    yield "head + loss, forward and backward", "torch, full logits", 0, flops, plain, note


def gemm_cases(shape: Shape, sweep: bool) -> Iterator[Case]:
    """The three products of each linear layer: torch's in BF16, TransformerEngine's and the fused layers'.

    Our own kernel makes two of them, once it has made small ones right.
    """
    from megatron_fp8_ext.kernels import cublaslt, hopper_gemm
    from megatron_fp8_ext.kernels.cast import BlockCast, cast_1x128
    from megatron_fp8_ext.megatron_plugin import te_tensor
    from megatron_fp8_ext.megatron_plugin.te_gemm import TEGemm

    try:
        gemms = {"TE blockwise": TEGemm(direct=False)}
        if cublaslt.reason(torch.cuda.current_device()) is None:
            gemms["cuBLASLt, called here"] = TEGemm(direct=True)
            if hopper_gemm.reason(torch.cuda.current_device()) is None:
                gemms["ours"] = TEGemm(direct=True, own=True)
        quantize = te_tensor.quantizer("power_of_two", True)
    except (ImportError, OSError) as error:
        raise UserError(f"bench gemm needs TransformerEngine: {error}") from error
    for name, n, k in shape.linears():
        x, dy, w = _random(shape.tokens, k), _random(shape.tokens, n), _random(n, k) * 0.02
        flops, size = 2 * shape.tokens * n * k, f"M {shape.tokens} N {n} K {k}"
        x_cast: BlockCast = cast_1x128(x, "power_of_two")
        dy_cast: BlockCast = cast_1x128(dy, "power_of_two")
        w_cast = quantize(w)
        yield f"{name} fprop", "BF16", 0, flops, partial(torch.mm, x, w.t()), size
        for by, gemm in gemms.items():
            yield f"{name} fprop", by, 0, flops, partial(gemm.fprop, x_cast, w_cast), ""
        yield f"{name} dgrad", "BF16", 0, flops, partial(torch.mm, dy, w), size
        for by, gemm in gemms.items():
            yield f"{name} dgrad", by, 0, flops, partial(gemm.dgrad, dy_cast, w_cast), ""
        main_grad = torch.zeros(n, k, dtype=torch.float32, device="cuda")
        yield f"{name} wgrad", "BF16", 0, flops, partial(torch.mm, dy.t(), x), size
        for note, out, add in (
            ("to new BF16", None, False),
            ("added to FP32", main_grad, True),
            ("over FP32", main_grad, False),
        ):
            for by, gemm in gemms.items():
                if by != "ours":  # it makes the other two
                    wgrad = partial(gemm.wgrad, x_cast, dy_cast, out, add)
                    yield f"{name} wgrad", by, 0, flops, wgrad, note


def markdown(record: dict[str, Any]) -> str:
    """Return the record as a table."""
    shape, versions = record["shape"], record["versions"]
    lines = [
        f"{record['device']}, {', '.join(f'{k} {v}' for k, v in versions.items())}  ",
        f"{shape['name']}: {shape['tokens']} tokens, hidden {shape['hidden']}, FFN {shape['ffn']}, "
        f"vocabulary {shape['vocabulary']}  ",
        f"limits measured in this run: copy {record['copy_tb_s']:.2f} TB/s, BF16 GEMM "
        f"{record['bf16_gemm_tflop_s']:.0f} TFLOP/s",
        "",
        "| kernel | by | ms (10 % to 90 %) | rate | of the limit | peak MB | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        time = row["time"]
        if row["flops"]:
            rate = f"{row['flops'] / time['median'] / 1e9:.0f} TFLOP/s"
        else:
            rate = f"{row['bytes'] / time['median'] / 1e9:.2f} TB/s"
        lines.append(
            f"| {row['kernel']} | {row['by']} | {time['median']:.3f} "
            f"({time['low']:.3f} to {time['high']:.3f}) | {rate} | {row['of_limit']:.2f} | "
            f"{row['peak_mb']:.0f} | {row['note']} |"
        )
    return "\n".join(lines) + "\n"
