"""The CUDA C++ kernels' code, run on the CPU: bit for bit the specification's casts, as on a GPU."""

from __future__ import annotations

import cuda_on_cpu
import pytest
from kernel_cases import DEVICE, assert_same_cast, torch, ulps_apart

from megatron_fp8_ext.fp8 import reference
from megatron_fp8_ext.kernels import cast, hopper, rmsnorm, rope, self_check, stash, support, swiglu

pytestmark = [
    pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="needs g++"),
    pytest.mark.skipif(DEVICE != "cpu", reason="tests/gpu/test_hopper.py runs them on the GPU"),
]
FORMATS = ("power_of_two", "float32")
POW2 = "power_of_two"


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Everything goes where a Hopper GPU would take it, and runs here."""

    def kernel(device, file, macros, shared=0):
        return cuda_on_cpu.Kernel(file, macros, hopper._ENTRY[file])

    def takes(x, *sizes):
        return x.dtype is torch.bfloat16 and all(size % 128 == 0 for size in sizes)

    caches = (hopper._tile_kernel, hopper._norm_kernel, hopper._rope_kernel, hopper._sum_kernel)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(hopper, "_kernel", kernel)
    monkeypatch.setattr(hopper, "launch", lambda found, device, *rest: found(*rest))
    monkeypatch.setattr(hopper, "takes", takes)
    monkeypatch.setattr(hopper, "takes_norm", lambda x, gain: takes(x, x.shape[1]))
    monkeypatch.setattr(hopper, "reason", lambda device: None)
    yield
    for cached in caches:
        cached.cache_clear()


def random(*size, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(2 * torch.randn(size, generator=generator))
    return (torch.randn(size, generator=generator) * spread * scale).bfloat16()


def is_cast_of(got, x, scale_format, rows=True, columns=True):
    if rows:
        assert_same_cast(got.quantized(), reference.quantize_rows(x, scale_format))
    if columns:
        want = reference.quantize_columns(x, scale_format)
        assert_same_cast(got.quantized(columns=True), want)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_casts(scale_format):
    x = random(256, 256)
    x[3, 5], x[70, 200], x[9, :128], x[200] = float("nan"), float("inf"), 0, 1e-39
    is_cast_of(cast.cast_1x128(x, scale_format), x, scale_format)
    is_cast_of(cast.cast_1x128(x, scale_format, columns=False), x, scale_format, columns=False)
    is_cast_of(cast.cast_1x128(x, scale_format, rows=False), x, scale_format, rows=False)


def test_every_bit_pattern():
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = bits[torch.randperm(65536, generator=torch.Generator().manual_seed(1))].reshape(256, 256)
    is_cast_of(cast.cast_1x128(x.contiguous(), POW2), x, POW2)


def test_cast_and_sum_of_columns():
    x = random(256, 384)
    got, total = cast.cast_1x128_and_sum(x, POW2)
    is_cast_of(got, x, POW2)
    want = x.double()
    assert ((total - want.sum(0)).abs() <= 1e-6 * want.abs().sum(0)).all()


def test_swiglu():
    x = random(128, 512).clamp(-80, 80)  # the kernel's sigmoid counts numbers below 2^-126 as zero
    for columns in (True, False):
        got = swiglu.swiglu_cast(x, POW2, columns=columns, keep=True)
        exact = torch.nn.functional.silu(x[:, :256].float()) * x[:, 256:].float()
        assert ulps_apart(got.kept, exact) <= 1
        is_cast_of(got.cast, got.kept, POW2, columns=columns)


def gradients(x, dy):
    x = x.float().requires_grad_()
    gate, up = x.chunk(2, dim=-1)
    (dx,) = torch.autograd.grad(torch.nn.functional.silu(gate) * up, x, dy.float())
    return dx


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("y_columns", [False, True])
def test_swiglu_backward(y_columns, scale_format):
    x, dy = random(256, 512, seed=1).clamp(-80, 80), random(256, 256, scale=1e-3, seed=2)
    got = swiglu.swiglu_backward_cast(dy, x, scale_format, keep=True, y_columns=y_columns)
    # FP32's own rounding shows where the two terms of the gate's gradient cancel.
    near = (got.kept.float() - gradients(x, dy)).abs()
    assert (near <= 2.0**-8 * gradients(x, dy).abs() + 1e-6 * dy.float().abs().max()).all()
    is_cast_of(got.cast, got.kept, scale_format)
    if y_columns:
        y = swiglu.swiglu_cast(x, scale_format, keep=True).kept
        is_cast_of(got.y, y, scale_format, rows=False)


@pytest.mark.parametrize("y_columns", [False, True])
def test_stash(y_columns):
    x, dy = random(128, 512, seed=1).clamp(-80, 80), random(128, 256, scale=1e-3, seed=2)
    x[3, 5], x[7, 300], x[9, 30:70], x[11, :32] = float("nan"), float("inf"), 0, 1e-38
    made = swiglu.swiglu_cast(x, POW2, columns=False, stash=True, keep=True)
    is_cast_of(made.cast, made.kept, POW2, columns=False)
    want = stash.quantize(x)
    # The kernel rounds a product that lies between two codes once, torch twice.
    codes_apart = (made.stash.codes.int() - want.codes.int()).abs()
    assert codes_apart.max() <= 1 and codes_apart.float().mean() < 2e-3
    torch.testing.assert_close(made.stash.scales, want.scales, rtol=0, atol=0, equal_nan=True)
    got = swiglu.swiglu_backward_cast(dy, made.stash, POW2, keep=True, y_columns=y_columns)
    exact = gradients(made.stash.dequantize(), dy)
    finite = exact.isfinite()
    assert torch.equal(finite, got.kept.isfinite())
    apart = (got.kept.float() - exact)[finite].abs()
    assert (apart <= 2.0**-8 * exact[finite].abs() + 1e-6).all()
    is_cast_of(got.cast, got.kept, POW2)
    if y_columns:
        values = made.stash.dequantize()
        y = torch.nn.functional.silu(values[:, :256]) * values[:, 256:]
        want = reference.quantize_columns(y.bfloat16(), POW2)
        apart = got.y.quantized(columns=True).codes.view(torch.uint8) != want.codes.view(
            torch.uint8
        )
        assert apart.float().mean() < 1e-3  # one BF16 step, where the exponential differs


@pytest.mark.parametrize(("m", "h", "programs"), [(256, 384, 7), (128, 1536, 40), (128, 128, 300)])
def test_rmsnorm(m, h, programs, monkeypatch):
    """Programs that have more rows than stages, fewer, and one; threads beyond the row."""
    monkeypatch.setattr(support, "processors", lambda device: 1)
    native = hopper.norm_backward
    monkeypatch.setattr(
        hopper,
        "norm_backward",
        lambda *args: native(*args[:5], min(m, programs), args[6]),
    )
    x, gain = random(m, h, seed=1), random(h, seed=2)
    normed = rmsnorm.rmsnorm_cast(x, gain, 1e-6, POW2, keep=True)
    exact = torch.nn.functional.rms_norm(x.float(), (h,), gain.float(), 1e-6)
    assert ulps_apart(normed.kept, exact) <= 1
    is_cast_of(normed.cast, normed.kept, POW2)
    dy, past = random(m, h, scale=1e-3, seed=3), random(m, h, scale=1e-3, seed=4)
    for residual in (None, past):
        got = rmsnorm.rmsnorm_backward_cast(
            dy, x, gain, normed.rstd, POW2, residual=residual, rows=False, columns=False
        )
        xd, gd = x.double().requires_grad_(), gain.double().requires_grad_()
        y = torch.nn.functional.rms_norm(xd, (h,), gd, 1e-6)
        dx, dgain = torch.autograd.grad(y, (xd, gd), dy.double())
        want = dx if residual is None else dx + residual.double()
        apart = (got.dx.double() - want).abs()
        assert (apart <= 2.0**-8 * want.abs() + 1e-6 * dy.double().abs().max()).all()
        torch.testing.assert_close(got.dweight.double(), dgain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 33, 128, 660])
def test_sums_of_parts(parts):
    """More rows than a program reads at a time, fewer, and one; a NaN stays in its column."""
    values = torch.randn(parts, 384, generator=torch.Generator().manual_seed(parts))
    values[parts // 2, 17] = float("nan")
    exact = values.double().sum(0)
    total = hopper.sum_of_parts(values, torch.float32)
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-4, equal_nan=True)
    half = hopper.sum_of_parts(values, torch.bfloat16)
    torch.testing.assert_close(half, total.bfloat16(), rtol=0, atol=0, equal_nan=True)
    for before in (torch.full((384,), 3.0), torch.full((384,), 3.0, dtype=torch.bfloat16)):
        want = (before.float() + total).to(before.dtype)
        assert hopper.sum_of_parts(values, torch.float32, add_to=before) is before
        torch.testing.assert_close(before, want, rtol=0, atol=0, equal_nan=True)


def test_qkv_split_and_rotated():
    s, b, groups, queries, head = 5, 2, 2, 3, 128
    qkv = random(s, b, groups, (queries + 2) * head).requires_grad_()
    frequencies = 1e6 ** (-torch.arange(0, head, 2) / head)
    angles = torch.outer(torch.arange(s).float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)[:, None, None]
    mine = rope.split_and_rotate(qkv, angles)
    q, k, v = qkv.float().split([queries * head, head, head], dim=-1)
    q = q.reshape(s, b, groups * queries, head)

    def rotate(t):
        first, second = t.chunk(2, dim=-1)
        return t * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()

    want = (rotate(q), rotate(k), v)
    for got, expected in zip(mine, want, strict=True):
        assert torch.allclose(got.float(), expected, rtol=2**-7, atol=1e-3)
    dy = [random(*t.shape, seed=9) for t in mine]
    grad = torch.autograd.grad(mine, qkv, dy)[0].float()
    exact = torch.autograd.grad(want, qkv, [t.float() for t in dy])[0].float()
    assert torch.allclose(grad, exact, rtol=2**-6, atol=2e-3)


def test_the_self_check(monkeypatch):
    """Nothing to say of right kernels; a wrong one is named."""
    assert self_check.failure(torch.device("cpu")) is None
    native = cuda_on_cpu.translated

    def broken(file, macros, entry):
        source = native(file, macros, entry)
        return source.replace(
            "result[j] = inverse * (scaled[j] -", "result[j] = inverse * (scaled[j] +"
        )

    monkeypatch.setattr(cuda_on_cpu, "translated", broken)
    hopper._norm_kernel.cache_clear()
    assert self_check.failure(torch.device("cpu")).startswith("RMSNorm's backward is wrong")


def test_an_unknown_instruction_is_said(monkeypatch):
    monkeypatch.delitem(cuda_on_cpu.PTX, "max.bf16x2")
    with pytest.raises(KeyError, match=r"max\.bf16x2"):
        cuda_on_cpu.translated("hopper_norm.cu", (), "rmsnorm_rows")
