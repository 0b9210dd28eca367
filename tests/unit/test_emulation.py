"""The emulated linear layer: right GEMMs, right casts, counted."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from megatron_fp8_ext.fp8 import emulation, reference  # noqa: E402
from megatron_fp8_ext.fp8.error import sqnr_db  # noqa: E402

POW2 = "power_of_two"


def layer(x, w, b=None):
    return emulation.EmulatedLinear.apply(x, w, b, False, False, None, POW2)


def test_three_gemms_use_the_operands_of_the_recipe():
    torch.manual_seed(0)
    x = torch.randn(6, 32, 256, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(384, 256, dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(384, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(6, 32, 384, dtype=torch.bfloat16)
    y = layer(x, w, b)
    y.backward(dy)

    x_MK, dy_MN = x.detach().view(-1, 256), dy.view(-1, 384)
    rows = lambda t: reference.quantize_rows(t, POW2).dequantize()  # noqa: E731
    columns = lambda t: reference.quantize_columns(t, POW2).dequantize()  # noqa: E731
    weight = reference.quantize_weight(w.detach(), POW2).dequantize()
    want_y = (rows(x_MK) @ weight.t() + b.detach().float()).bfloat16()
    assert torch.equal(y.detach().view(-1, 384), want_y)
    assert torch.equal(x.grad.view(-1, 256), (rows(dy_MN) @ weight).bfloat16())
    assert torch.equal(w.grad, (columns(dy_MN) @ columns(x_MK).t()).bfloat16())
    assert torch.equal(b.grad, dy_MN.sum(0))


def test_it_is_quantized_and_close():
    torch.manual_seed(1)
    x, w = torch.randn(256, 512), torch.randn(128, 512)
    exact = x @ w.t()
    quality = sqnr_db(exact, layer(x, w))
    assert 25 < quality < 35  # FP8, neither BF16 (about 50 dB) nor broken


def test_casts_are_counted():
    emulation.quantizations.clear()
    x, w = torch.randn(16, 128, requires_grad=True), torch.randn(16, 128, requires_grad=True)
    layer(x, w).sum().backward()
    assert emulation.quantizations == {
        "input rows": 1, "weight": 1, "grad rows": 1, "grad columns": 1, "input columns": 1,
    }  # fmt: skip


def test_autocast_nests_and_ends():
    assert emulation.active_scale_format() is None
    with emulation.autocast(POW2):
        with emulation.autocast("float32"):
            assert emulation.active_scale_format() == "float32"
        assert emulation.active_scale_format() == POW2
    assert emulation.active_scale_format() is None
