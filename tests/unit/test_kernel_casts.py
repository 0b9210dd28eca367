"""Our Triton casts are fp8/reference.py bit for bit: under the interpreter here, compiled on a GPU."""

from __future__ import annotations

import pytest
from kernel_cases import DEVICE, FORMATS, assert_same_cast, edge_cases, torch

from megatron_fp8_ext.fp8 import reference
from megatron_fp8_ext.kernels import cast

DTYPES = (torch.bfloat16, torch.float32)


def check_1x128(x, scale_format):
    got = cast.cast_1x128(x, scale_format)
    assert_same_cast(got.quantized(), reference.quantize_rows(x, scale_format))
    assert_same_cast(got.quantized(columns=True), reference.quantize_columns(x, scale_format))


def check_128x128(x, scale_format):
    got = cast.cast_128x128(x, scale_format)
    want = reference.quantize_weight(x, scale_format)
    assert_same_cast(got.quantized(), want)
    turned = reference.Quantized(
        want.codes.t().contiguous(), want.scale_inv.t().contiguous(), want.block
    )
    assert_same_cast(got.quantized(columns=True), turned)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("case", edge_cases())
@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_cases_are_the_specification(case, scale_format, dtype):
    x = edge_cases()[case].to(DEVICE, dtype)
    check_1x128(x, scale_format)
    if dtype == torch.bfloat16:
        check_128x128(x, scale_format)
    else:
        with pytest.raises(ValueError, match="cast from bf16"):
            cast.cast_128x128(x, scale_format)


@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (130, 3), (127, 129), (144, 208), (260, 400)])
@pytest.mark.parametrize("scale_format", FORMATS)
def test_partial_blocks(shape, scale_format):
    torch.manual_seed(1)
    x = (torch.randn(shape) * torch.exp(3 * torch.randn(shape))).to(DEVICE, torch.bfloat16)
    check_1x128(x, scale_format)
    check_128x128(x, scale_format)


def test_every_bf16_magnitude_as_amax():
    """Each of the 32640 finite magnitudes of BF16, as the amax of a block of its own."""
    bits = torch.arange(0, 0x7F80, dtype=torch.int32).to(torch.int16)
    amax = bits.view(torch.bfloat16)
    x = torch.zeros(amax.numel(), 128, dtype=torch.bfloat16)
    x[:, 0], x[:, 1] = amax, -amax / 3
    x = x.to(DEVICE)
    for scale_format in FORMATS:
        got = cast.cast_1x128(x, scale_format, columns=False)
        assert_same_cast(got.quantized(), reference.quantize_rows(x, scale_format))


def test_layout_is_transformer_engines():
    x = torch.randn(130, 260).to(DEVICE)
    both = cast.cast_1x128(x, "power_of_two")
    assert both.rows.codes.shape == (130, 260) and both.rows.scale_inv.shape == (3, 132)
    assert both.columns.codes.shape == (260, 130) and both.columns.scale_inv.shape == (2, 260)
    square = cast.cast_128x128(x.bfloat16(), "power_of_two")
    assert square.rows.scale_inv.shape == (2, 4)
    assert square.columns.codes.shape == (260, 130) and square.columns.scale_inv.shape == (3, 4)
    for operand in (both.rows, both.columns, square.rows, square.columns):
        assert operand.codes.dtype == torch.uint8 and operand.codes.is_contiguous()
    assert not both.rows.scale_inv[:, 130:].any(), "padding is zero"
    assert not square.rows.scale_inv[:, 3:].any()


def test_one_direction_alone_is_the_same():
    x = torch.randn(256, 256).to(DEVICE, torch.bfloat16)
    both = cast.cast_1x128(x, "power_of_two")
    rows = cast.cast_1x128(x, "power_of_two", columns=False)
    columns = cast.cast_1x128(x, "power_of_two", rows=False)
    assert rows.columns is None and columns.rows is None
    assert_same_cast(rows.quantized(), both.quantized())
    assert_same_cast(columns.quantized(columns=True), both.quantized(columns=True))
    with pytest.raises(ValueError, match="rows, columns or both"):
        cast.cast_1x128(x, "power_of_two", rows=False, columns=False)
    with pytest.raises(ValueError, match="has no columns"):
        rows.quantized(columns=True)


@pytest.mark.parametrize(
    "bad",
    [torch.ones(2, 2, 2), torch.ones(2, 2, dtype=torch.float16), torch.ones(4, 6).t()],
    ids=["3-D", "fp16", "not contiguous"],
)
def test_other_tensors_are_refused(bad):
    with pytest.raises(ValueError, match="contiguous bf16 or fp32 matrix"):
        cast.cast_1x128(bad, "power_of_two")


def test_no_rows_is_no_work():
    empty = cast.cast_1x128(torch.empty(0, 128).to(DEVICE), "power_of_two")
    assert empty.rows.codes.shape == (0, 128)
