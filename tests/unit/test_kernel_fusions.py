"""Fused kernels: codes are the cast of their own BF16 intermediate, and that is within 1 ulp of FP32."""

from __future__ import annotations

import pytest
from kernel_cases import DEVICE, FORMATS, assert_same_cast, torch, ulps_apart

from megatron_fp8_ext.fp8 import reference
from megatron_fp8_ext.fp8.error import sqnr_db
from megatron_fp8_ext.kernels import rmsnorm, stash, support, swiglu

SHAPES = [(256, 256), (130, 200), (1, 128), (257, 384)]
EPS = 1e-6


def check_cast(got, intermediate, scale_format):
    assert intermediate.dtype == torch.bfloat16
    assert_same_cast(got.quantized(), reference.quantize_rows(intermediate, scale_format))
    columns = reference.quantize_columns(intermediate, scale_format)
    assert_same_cast(got.quantized(columns=True), columns)


def random(*shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(shape, generator=generator))
    x = torch.randn(shape, generator=generator) * spread * scale
    return x.to(DEVICE, torch.bfloat16)


def exact_swiglu(x):
    """In the precision of `x`; FP32 where steps are counted, for there exp overflows at 88 too."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_forward(shape, scale_format):
    x = random(shape[0], 2 * shape[1])
    got, _, y = swiglu.swiglu_cast(x, scale_format, keep=True)
    check_cast(got, y, scale_format)
    assert ulps_apart(y, exact_swiglu(x.float())) <= 1


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_backward(shape, scale_format):
    x, dy = random(shape[0], 2 * shape[1]), random(*shape, scale=1e-3, seed=1)
    got, _, dx = swiglu.swiglu_backward_cast(dy, x, scale_format, keep=True)
    check_cast(got, dx, scale_format)
    leaf = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(exact_swiglu(leaf), leaf, dy.double())
    # Where 1 + gate (1 - sigmoid) cancels, a step of the tiny result says nothing: FP32 has lost it.
    large = exact.abs() > 1e-6 * exact.abs().max()
    assert ulps_apart(dx.masked_fill(~large, 0), exact.float().masked_fill(~large, 0)) <= 1
    error = (dx.double() - exact).abs().max() / exact.abs().max()
    assert error < 2**-8


def test_swiglu_propagates_what_is_not_finite_as_torch_does():
    x = random(128, 256)
    x[3, 5], x[7, 140], x[9, 9], x[11, 13] = float("nan"), float("inf"), float("inf"), -200.0
    got, _, y = swiglu.swiglu_cast(x, "power_of_two", keep=True)
    gate, up = x.float().chunk(2, dim=-1)
    want = (torch.nn.functional.silu(gate) * up).to(torch.bfloat16)
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
    check_cast(got, y, "power_of_two")


def test_swiglu_without_the_intermediate_is_the_same():
    x, dy = random(128, 512), random(128, 256, seed=1)
    for run in (
        lambda keep: swiglu.swiglu_cast(x, "power_of_two", keep=keep),
        lambda keep: swiglu.swiglu_backward_cast(dy, x, "power_of_two", keep=keep),
    ):
        (kept, *_), (plain, _, nothing) = run(True), run(False)
        assert nothing is None
        assert_same_cast(plain.quantized(), kept.quantized())
        assert_same_cast(plain.quantized(columns=True), kept.quantized(columns=True))


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("shape", [(256, 256), (130, 128), (130, 200)])
def test_swiglu_backward_makes_the_operand_of_wgrad_again(shape, scale_format):
    x, dy = random(shape[0], 2 * shape[1]), random(*shape, scale=1e-3, seed=1)
    want = swiglu.swiglu_cast(x, scale_format, rows=False).cast
    plain = swiglu.swiglu_backward_cast(dy, x, scale_format)
    got = swiglu.swiglu_backward_cast(dy, x, scale_format, y_columns=True)
    assert plain.y is None
    assert_same_cast(got.y.quantized(columns=True), want.quantized(columns=True))
    for columns in (False, True):
        assert_same_cast(got.cast.quantized(columns), plain.cast.quantized(columns))


def same_stash(ours, want):
    """Bit for bit; a compiler may round a product that lies between two codes once instead of twice."""
    torch.testing.assert_close(ours.scales, want.scales, rtol=0, atol=0, equal_nan=True)
    apart = (ours.codes.int() - want.codes.int()).abs()
    assert apart.max() <= (0 if support.interpreted() else 1) and apart.float().mean() < 5e-3


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("shape", [(256, 256), (130, 128)])
def test_swiglu_stash(shape, scale_format):
    x, dy = random(shape[0], 2 * shape[1]), random(*shape, scale=1e-3, seed=1)
    got = swiglu.swiglu_cast(x, scale_format, columns=False, stash=True, keep=True)
    want = stash.quantize(x)
    same_stash(got.stash, want)
    assert_same_cast(got.cast.quantized(), reference.quantize_rows(got.kept, scale_format))
    # The backward from the stash is the backward from what the stash stands for.
    exact = got.stash.dequantize()
    from_stash = swiglu.swiglu_backward_cast(dy, got.stash, scale_format, keep=True, y_columns=True)
    from_fp32 = swiglu.swiglu_backward_cast(dy, exact, scale_format, keep=True, y_columns=True)
    assert torch.equal(from_stash.kept, from_fp32.kept)
    check_cast(from_stash.cast, from_stash.kept, scale_format)
    assert_same_cast(from_stash.y.quantized(columns=True), from_fp32.y.quantized(columns=True))


def test_a_stash_has_whole_blocks():
    with pytest.raises(ValueError, match="whole blocks of 128"):
        swiglu.swiglu_cast(random(128, 400), "power_of_two", stash=True)
    kept = swiglu.swiglu_cast(random(128, 512), "power_of_two", stash=True).stash
    with pytest.raises(ValueError, match=r"that of \[64, 512\]"):
        swiglu.swiglu_backward_cast(random(64, 256), kept, "power_of_two")


@pytest.mark.parametrize(("tail", "keeps"), [("normal", 44), ("heavy", 40), ("outliers", 37)])
def test_what_a_stash_keeps(tail, keeps):
    """In dB, where E4M3 in blocks of 128 keeps 31 of each."""
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    if tail == "heavy":
        x = x * x.abs() ** 1.5
    if tail == "outliers":
        x[:, ::97] *= 50
    x = x.to(torch.bfloat16)
    assert sqnr_db(x, stash.quantize(x).dequantize()) > keeps
    assert sqnr_db(x, reference.quantize_rows(x, "power_of_two").dequantize()) < 33


def test_a_stash_of_what_is_not_finite_or_tiny():
    x = random(128, 512)
    x[3, 5], x[7, 140], x[9, 300:320] = float("nan"), float("inf"), 0
    x[11, 128:160] = 1e-38
    made = swiglu.swiglu_cast(x, "power_of_two", stash=True).stash
    same_stash(made, stash.quantize(x))
    back = made.dequantize()
    assert back[3, :32].isnan().all() and back[7, 128:160].isnan().all()
    assert not back[3, 32:].isnan().any() and not back[11, 128:160].any()


def test_skipping_the_rounding_would_change_codes():
    """The negative control: cast the FP32 intermediate instead, and codes differ."""
    x = random(256, 1024)
    got, *_ = swiglu.swiglu_cast(x, "power_of_two")
    unrounded = reference.quantize_rows(exact_swiglu(x.float()), "power_of_two")
    flipped = got.quantized().codes.view(torch.uint8) != unrounded.codes.view(torch.uint8)
    assert 0.01 < flipped.float().mean().item() < 0.1


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("shape", [*SHAPES, (5, 1536)])
def test_rmsnorm_forward(shape, scale_format):
    x, w = random(*shape), random(shape[1], seed=2)
    got = rmsnorm.rmsnorm_cast(x, w, EPS, scale_format, keep=True)
    check_cast(got.cast, got.kept, scale_format)
    exact = torch.nn.functional.rms_norm(x.double(), (shape[1],), w.double(), EPS)
    assert ulps_apart(got.kept, exact.float()) <= 1


def test_rmsnorm_columns_may_come_later():
    x, w = random(256, 384), random(384, seed=2)
    whole = rmsnorm.rmsnorm_cast(x, w, EPS, "power_of_two")
    first = rmsnorm.rmsnorm_cast(x, w, EPS, "power_of_two", columns=False)
    assert first.cast.columns is None
    late = rmsnorm.rmsnorm_columns(x, w, first.rstd, "power_of_two")
    assert_same_cast(late.quantized(columns=True), whole.cast.quantized(columns=True))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rmsnorm_backward(shape, residual):
    x, w = random(*shape), random(shape[1], seed=2)
    dy = random(*shape, scale=1e-3, seed=3)
    past = random(*shape, scale=1e-3, seed=4) if residual else None
    rstd = rmsnorm.rmsnorm_cast(
        x, w, EPS, "power_of_two", rows=False, columns=False, keep=True
    ).rstd
    got = rmsnorm.rmsnorm_backward_cast(dy, x, w, rstd, "power_of_two", residual=past)
    check_cast(got.cast, got.dx, "power_of_two")

    leaf, gain = x.double().requires_grad_(), w.double().requires_grad_()
    y = torch.nn.functional.rms_norm(leaf, (shape[1],), gain, EPS)
    dx, dw = torch.autograd.grad(y, (leaf, gain), dy.double())
    dx = dx if past is None else dx + past.double()
    large = dx.abs() > 1e-4 * dx.abs().max()
    assert ulps_apart(got.dx.masked_fill(~large, 0), dx.float().masked_fill(~large, 0)) <= 1
    assert (got.dx.double() - dx).abs().max() / dx.abs().max() < 2**-8
    torch.testing.assert_close(got.dweight.double(), dw, rtol=1e-4, atol=1e-6)


def test_rmsnorm_propagates_nan_within_its_row():
    x, w = random(130, 256), random(256, seed=2)
    x[4, 7] = float("nan")
    got = rmsnorm.rmsnorm_cast(x, w, EPS, "power_of_two", keep=True)
    assert got.kept[4].isnan().all() and not got.kept[5:].isnan().any()
    check_cast(got.cast, got.kept, "power_of_two")


def test_shapes_that_do_not_belong_together_are_refused():
    x = random(4, 256)
    with pytest.raises(ValueError, match=r"must be \[4, 512\]"):
        swiglu.swiglu_backward_cast(random(4, 256), x, "power_of_two")
    with pytest.raises(ValueError, match="even number"):
        swiglu.swiglu_cast(random(4, 3), "power_of_two")
    with pytest.raises(ValueError, match=r"weight must be \[256\]"):
        rmsnorm.rmsnorm_cast(x, random(128), EPS, "power_of_two")
    with pytest.raises(ValueError, match="one program holds"):
        rmsnorm.rmsnorm_cast(random(1, 16512), random(16512), EPS, "power_of_two")
