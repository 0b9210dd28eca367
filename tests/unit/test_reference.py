"""fp8/reference.py is the specification: every edge by hand, the rest by property."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from megatron_fp8_ext.fp8 import reference  # noqa: E402
from megatron_fp8_ext.fp8.error import sqnr_db  # noqa: E402

POW2 = "power_of_two"
BOTH = (POW2, "float32")


def row(*values: float, dtype=torch.float32):
    return torch.tensor([list(values) + [0.0] * (128 - len(values))], dtype=dtype)


def scale_of(amax: float, scale_format: str) -> float:
    return reference.quantize_rows(row(amax), scale_format).scale_inv.item() ** -1


@pytest.mark.parametrize("exponent", range(-100, 100, 7))
def test_exact_powers_of_two_use_the_exponent_bits(exponent):
    # 448 / 2^e = 1.75 * 2^(8 - e): the mantissa is cut, whatever log2 would round to.
    assert scale_of(2.0**exponent, POW2) == 2.0 ** (8 - exponent)


def test_scale_rounds_down_just_above_a_power():
    assert scale_of(448.0, POW2) == 1.0
    assert scale_of(math.nextafter(448.0, 1000) * (1 + 2**-20), POW2) == 0.5
    assert scale_of(224.0, POW2) == 2.0


def test_no_value_overflows_and_the_largest_code_is_reached():
    q = reference.quantize_rows(row(3.0, -3.0, 1e-3), "float32")
    assert q.codes[0, 0].item() == 448.0 and q.codes[0, 1].item() == -448.0


@pytest.mark.parametrize("scale_format", BOTH)
def test_zero_block_has_scale_one(scale_format):
    q = reference.quantize_rows(row(0.0), scale_format)
    assert q.scale_inv.item() == 1.0
    assert not q.codes.view(torch.uint8).any()


@pytest.mark.parametrize("scale_format", BOTH)
def test_infinity_saturates_with_scale_one(scale_format):
    q = reference.quantize_rows(row(math.inf, -math.inf, 2.0), scale_format)
    assert q.scale_inv.item() == 1.0
    assert q.codes[0, :3].float().tolist() == [448.0, -448.0, 2.0]


@pytest.mark.parametrize("scale_format", BOTH)
def test_nan_stays_alone(scale_format):
    clean = reference.quantize_rows(row(3.0, 1.0), scale_format)
    q = reference.quantize_rows(row(3.0, math.nan), scale_format)
    assert q.scale_inv.item() == clean.scale_inv.item()
    assert q.codes[0, 0].item() == clean.codes[0, 0].item()
    assert q.codes.view(torch.uint8)[0, 1].item() == 0x7F


def test_only_nan_has_scale_one():
    q = reference.quantize_rows(torch.full((1, 128), math.nan), POW2)
    assert q.scale_inv.item() == 1.0
    assert (q.codes.view(torch.uint8) == 0x7F).all()


@pytest.mark.parametrize("block", [(1, 128), (128, 128)])
def test_a_gpu_that_does_not_look_for_nan_gives_the_same(block, monkeypatch):
    """There every cast provides for NaN; on the CPU one without any takes the short way."""
    torch.manual_seed(2)
    x = (torch.randn(200, 300) * torch.exp(4 * torch.randn(200, 300))).to(torch.bfloat16)
    x[0, :130], x[5, 7] = 0, math.inf
    short = reference.quantize(x, block, POW2)
    monkeypatch.setattr(reference, "_may_hold_nan", lambda x: True)
    long = reference.quantize(x, block, POW2)
    assert torch.equal(short.codes.view(torch.uint8), long.codes.view(torch.uint8))
    assert torch.equal(short.scale_inv, long.scale_inv)


def test_tiny_amax_takes_the_largest_power():
    # 448 / 1e-38 overflows FP32; the multiplier stops at 2^127 and its inverse is subnormal.
    q = reference.quantize_rows(row(1e-38), POW2)
    assert q.scale_inv.item() == 2.0**-127
    assert q.codes[0, 0].item() == pytest.approx(1e-38 * 2.0**127, rel=0.07)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiny_amax_under_fp32_scales_is_bounded_by_the_input_type(dtype):
    q = reference.quantize_rows(row(1e-38, dtype=dtype), "float32")
    assert q.scale_inv.item() == (1 / torch.tensor(torch.finfo(dtype).max)).item()


def test_subnormal_codes_round_to_nearest_even():
    # Smallest subnormal of E4M3 is 2^-9; with scale 1 (amax 448) half of it rounds to zero (even).
    q = reference.quantize_rows(row(448.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10), POW2)
    assert q.codes[0, 1:4].float().tolist() == [2.0**-9, 0.0, 2.0**-8]


def test_block_of_a_weight_is_square():
    w = torch.ones(256, 256)
    w[128:, 128:] *= 100
    q = reference.quantize_weight(w, POW2)
    assert q.scale_inv.shape == (2, 2)
    assert q.scale_inv[0, 0] == q.scale_inv[0, 1] != q.scale_inv[1, 1]


@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (130, 3), (127, 129), (256, 384)])
@pytest.mark.parametrize("block", [(1, 128), (128, 128)])
def test_partial_blocks_equal_the_padded_whole(shape, block):
    torch.manual_seed(0)
    x = torch.randn(shape)
    padded = torch.zeros(-(-shape[0] // 128) * 128, -(-shape[1] // 128) * 128)
    padded[: shape[0], : shape[1]] = x
    got, want = (reference.quantize(t, block, POW2) for t in (x, padded))
    rows, cols = shape
    assert torch.equal(got.codes.view(torch.uint8), want.codes.view(torch.uint8)[:rows, :cols])
    grid = got.scale_inv.shape
    assert torch.equal(got.scale_inv, want.scale_inv[: grid[0], : grid[1]])
    assert got.dequantize().shape == x.shape


def test_columns_are_cast_from_high_precision():
    x = torch.randn(256, 128)
    q = reference.quantize_columns(x, POW2)
    assert q.codes.shape == (128, 256)
    again = reference.quantize_rows(x.t().contiguous(), POW2)
    assert torch.equal(q.codes.view(torch.uint8), again.codes.view(torch.uint8))


def test_power_of_two_dequantizes_exactly_in_bf16():
    q = reference.quantize_rows(torch.randn(64, 256), POW2)
    assert torch.equal(q.dequantize(torch.bfloat16).float(), q.dequantize(torch.float32))


@pytest.mark.parametrize("bad", [torch.ones(2, 2, 2), torch.ones(2, 2, dtype=torch.float16)])
def test_other_shapes_and_dtypes_are_refused(bad):
    with pytest.raises(ValueError, match="bf16 or fp32 matrix"):
        reference.quantize(bad, (1, 128), POW2)


@given(
    seed=st.integers(0, 2**31),
    magnitude=st.integers(-60, 60),
    rows=st.integers(1, 9),
    cols=st.integers(1, 300),
    scale_format=st.sampled_from(BOTH),
    square=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_error_is_within_half_a_step(seed, magnitude, rows, cols, scale_format, square):
    """|x - dequantized| <= 2^-4 |x| for normal codes, and half a subnormal step below."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator) * 2.0**magnitude
    q = reference.quantize(x, (128, 128) if square else (1, 128), scale_format)
    block = q.block
    grid = q.scale_inv.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)
    bound = torch.maximum(x.abs() * 2.0**-4, grid[:, :cols] * 2.0**-10) * (1 + 1e-5)
    assert ((x - q.dequantize()).abs() <= bound).all()
    assert q.codes.float().abs().max() <= 448


@given(amax=st.floats(2.0**-110, 2.0**120, width=32))
@settings(max_examples=300, deadline=None)
def test_power_of_two_scale_is_the_largest_that_fits(amax):
    scale = scale_of(amax, POW2)
    mantissa, _ = math.frexp(scale)
    assert mantissa == 0.5, "a power of two"
    ratio = torch.tensor(448.0) / torch.tensor(amax)
    assert scale <= ratio.item() < 2 * scale


def test_sqnr_of_random_data_is_that_of_e4m3():
    torch.manual_seed(0)
    x = torch.randn(512, 512)
    assert 30 < sqnr_db(x, reference.quantize_rows(x, POW2).dequantize()) < 34
    assert sqnr_db(x, x) == math.inf
