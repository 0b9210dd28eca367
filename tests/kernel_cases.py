"""What the kernel tests on the CPU (Triton's interpreter) and on the GPU share.

Importing this module without a GPU switches Triton to its interpreter, before Triton is imported, and
mends the interpreter's conversions between FP32, BF16 and E4M3, which lose the carry of a rounding and are
wrong for subnormals (Triton 3.6 and 3.7); a compiled kernel uses the GPU's own instructions.
"""

from __future__ import annotations

import os
import sys

import pytest

torch = pytest.importorskip("torch")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = ("power_of_two", "float32")

if DEVICE == "cpu":
    if "triton.language" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("triton was imported before TRITON_INTERPRET", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")
import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

_native_convert = interpreter._convert_float


def _convert(x, source, target, rounding):
    if target == tl.float8e4nv and source == tl.float32:
        values = torch.from_numpy(np.ascontiguousarray(x).view(np.float32))
        codes = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        return codes.masked_fill(values.isnan(), 0x7F).numpy()
    if source == tl.bfloat16 and target == tl.float32:
        bits = np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32)
    if target == tl.bfloat16 and source == tl.float32:
        values = torch.from_numpy(np.ascontiguousarray(x).view(np.float32))
        return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return _native_convert(x, source, target, rounding)


if DEVICE == "cpu":
    interpreter._convert_float = _convert


def edge_cases(rows: int = 256, columns: int = 512) -> dict[str, torch.Tensor]:
    """FP32 matrices whose blocks hold one edge case each."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, columns, generator=generator)
    spread = torch.randn(rows, columns, generator=generator)
    powers = torch.randint(-20, 20, (rows, columns), generator=generator)
    columns_of = torch.arange(columns)
    cases = {
        "random": x,
        "wide range": x * torch.exp(4 * spread),
        "zero blocks": torch.where(columns_of // 128 % 2 == 0, 0.0, x),
        "exact powers of two": torch.exp2(powers.float()),
        "amax at 1.75": torch.sign(x) * 1.75 * torch.exp2(powers.float()),
        "amax just above a power": x.clamp(-1, 1) * (1 + 2**-7) * 448,
        "amax just above 1.75": x.clamp(-1, 1) * 1.75 * (1 + 2**-23),
        "tiny": x * 1e-38,
        "subnormal": x * 1e-42,
        "around 2^-119": torch.exp2(powers.float() / 4 - 119) * (1 + x.abs().clamp(max=1)),
        "huge": x * 5e37,
        "infinite": x.clone(),
        "not a number": x.clone(),
        "only not a number": torch.full_like(x, float("nan")),
    }
    cases["infinite"][5 % rows, 130 % columns] = float("inf")
    cases["infinite"][200 % rows, 3 % columns] = float("-inf")
    cases["not a number"][9 % rows, 300 % columns] = float("nan")
    return cases


def assert_same_cast(got, want) -> None:
    """Codes and scales of two `Quantized`, bit for bit."""
    assert got.codes.shape == want.codes.shape and got.scale_inv.shape == want.scale_inv.shape
    different = got.scale_inv.view(torch.int32) != want.scale_inv.view(torch.int32)
    assert not different.any(), f"{int(different.sum())} scales differ"
    different = got.codes.view(torch.uint8) != want.codes.view(torch.uint8)
    assert not different.any(), f"{int(different.sum())} codes differ"


def ulps_apart(got: torch.Tensor, want: torch.Tensor) -> int:
    """Largest distance between BF16 `got` and FP32 `want` rounded to BF16, in steps of BF16.

    NaN must meet NaN.
    """
    rounded = want.to(torch.bfloat16)
    assert torch.equal(got.isnan(), rounded.isnan())

    def line(x: torch.Tensor) -> torch.Tensor:  # the BF16 values in order, as integers
        bits = x.contiguous().view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    steps = (line(got) - line(rounded)).abs().masked_fill(got.isnan(), 0)
    return int(steps.max())
