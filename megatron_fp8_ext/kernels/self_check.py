"""What the CUDA kernels compute, against torch, before they are trusted on a machine (`hopper.reason`).

They are compiled by whatever NVRTC and driver a machine has. Once a process, a few small matrices tell a
kernel that does not compute what it should from one that does; where one does not, Triton's serve. The tests
hold them to the specification bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_fp8_ext.kernels import cast, rmsnorm, swiglu

ROWS, COLUMNS = 256, 384
# E4M3 leaves 31 dB, BF16 50; a wrong row, scale or sign leaves less than 10.
CODES, BF16 = 25.0, 40.0


def failure(device: torch.device) -> str | None:
    """Name the first kernel whose result is wrong on `device`, in a clause; None if none is."""
    with torch.no_grad():
        for name, got, want, floor in results(device):
            if wrong := verdict(name, got, want, floor):
                return wrong
    return None


def verdict(name: str, got: Tensor, want: Tensor, floor: float) -> str | None:
    """Say that the kernel `name` is wrong, in a clause, if its signal over noise is below `floor` dB."""
    noise = (got.double() - want.double()).square().sum()
    if bool(noise * 10 ** (floor / 10) <= want.double().square().sum()):
        return None
    return f"{name} is wrong on this machine, found before it was used"


def results(device: torch.device) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Yield (kernel, its result, what it should be, signal over noise in dB that it must have)."""
    generator = torch.Generator(device).manual_seed(0)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device).bfloat16()

    x, dy, past = random(ROWS, COLUMNS), random(ROWS, COLUMNS), random(ROWS, COLUMNS)
    both, total = cast.cast_1x128_and_sum(x, "power_of_two", torch.bfloat16)
    for made in (cast.cast_1x128(x, "power_of_two"), both):
        yield "a cast's rows", made.quantized().dequantize(), x, CODES
        yield "a cast's columns", made.quantized(columns=True).dequantize(), x.t(), CODES
    yield "a cast's sum of columns", total, x.double().sum(0), BF16

    inner = random(ROWS, 2 * COLUMNS)
    gate, up = inner.double().chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate)
    y = gate * sigmoid * up
    dgate = dy.double() * up * sigmoid * (1 + gate * (1 - sigmoid))
    gradient = torch.cat((dgate, dy.double() * gate * sigmoid), dim=1)
    rows = swiglu.swiglu_cast(inner, "power_of_two", columns=False).cast
    yield "SwiGLU", rows.quantized().dequantize(), y, CODES
    back = swiglu.swiglu_backward_cast(dy, inner, "power_of_two", y_columns=True)
    yield "SwiGLU's backward", back.cast.quantized().dequantize(), gradient, CODES
    yield (
        "SwiGLU's backward, columns",
        back.cast.quantized(columns=True).dequantize(),
        gradient.t(),
        CODES,
    )
    assert back.y is not None
    again = back.y.quantized(columns=True).dequantize()
    yield "SwiGLU's result in the backward", again, y.t(), CODES

    gain = random(1, COLUMNS)[0]
    normed = rmsnorm.rmsnorm_cast(x, gain, 1e-6, "power_of_two", columns=False)
    rstd = (x.double().square().mean(1, keepdim=True) + 1e-6).rsqrt()
    normal = x.double() * rstd
    yield "RMSNorm", normed.cast.quantized().dequantize(), normal * gain, CODES
    late = rmsnorm.rmsnorm_columns(x, gain, normed.rstd, "power_of_two")
    columns = late.quantized(columns=True).dequantize()
    yield "RMSNorm's columns", columns, (normal * gain).t(), CODES
    found = rmsnorm.rmsnorm_backward_cast(
        dy, x, gain, normed.rstd, "power_of_two",
        residual=past, rows=False, columns=False, dtype=torch.bfloat16,
    )  # fmt: skip
    scaled = dy.double() * gain
    dx = rstd * (scaled - normal * (scaled * normal).mean(1, keepdim=True)) + past
    yield "RMSNorm's backward", found.dx, dx, BF16
    yield "RMSNorm's gain", found.dweight, (dy.double() * normal).sum(0), BF16
