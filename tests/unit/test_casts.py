"""Casts other than the recipe's, and the statistics of all of them."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from megatron_fp8_ext.fp8 import casts, reference, statistics  # noqa: E402
from megatron_fp8_ext.recipe import CONTROL_E5M2, Cast, FP8Recipe  # noqa: E402

POW2 = "power_of_two"


def test_recipe_casts_are_the_references():
    x = torch.randn(200, 300)
    for block in ((1, 128), (128, 128)):
        ours = casts.quantize(x, Cast(block=block), POW2)
        theirs = reference.quantize(x, block, POW2)
        assert torch.equal(ours.codes.view(torch.uint8), theirs.codes.view(torch.uint8))


def test_one_mantissa_bit_is_the_nearest_of_all_such_values():
    """Against every value of the format, by search; ties to even are not compared."""
    grid = [m * 2.0**e for e in range(-6, 9) for m in (1.0, 1.5)] + [0.0, 2.0**-7]
    grid = torch.tensor(sorted({s * v for v in grid for s in (1, -1)}))
    x = torch.cat([torch.randn(500) * 10, torch.randn(500) * 0.01]).clamp(-384, 384)[None]
    got = casts.quantize(x, Cast(dtype="e4m1", block="tensor", scaled=False), POW2).dequantize()
    distance = (x[0][:, None] - grid).abs().amin(dim=1)
    assert torch.equal((x - got).abs()[0], distance)


def test_one_scale_for_a_tensor_reaches_the_largest_code():
    x = torch.randn(64, 64, dtype=torch.bfloat16)
    q = casts.quantize(x, Cast(dtype="e5m2", block="tensor"), "float32")
    assert q.codes.dtype == torch.float8_e5m2 and q.scale_inv.shape == (1, 1)
    assert q.codes.float().abs().max() == 57344.0
    assert torch.allclose(q.dequantize(), x.float(), rtol=0.126, atol=1e-6)


def test_statistics_of_hand_made_values():
    # Unscaled E5M2: 1 and 1.25 are exact, 2^-18 is below half the smallest subnormal, 70000 is clipped.
    x = torch.tensor([[1.0, 1.25, 2.0**-18, 70000.0, 0.0]])
    error = statistics.cast_error(x, CONTROL_E5M2.input, POW2)
    assert error.underflow == 1 / 4 and error.saturation == 1 / 5 and error.amax == 70000
    noise = (70000.0 - 57344.0) ** 2 + 2.0**-36
    assert error.sqnr_db == pytest.approx(10 * math.log10((70000.0**2 + 2.5625) / noise))
    exact = statistics.cast_error(torch.ones(2, 2), Cast(), POW2)
    assert exact == statistics.CastError(math.inf, 0.0, 0.0, 1.0)
    assert statistics.cast_error(torch.zeros(2, 2), Cast(), POW2).sqnr_db == math.inf


def test_a_scaled_cast_never_saturates():
    x = torch.randn(256, 256) * torch.exp(4 * torch.randn(256, 256))
    for scale_format in ("power_of_two", "float32"):
        assert statistics.cast_error(x, Cast(), scale_format).saturation == 0


def test_controls_are_worse_than_the_recipe():
    x = torch.randn(256, 256)
    good = statistics.cast_error(x, Cast(), POW2).sqnr_db
    one_bit = statistics.cast_error(x, Cast(dtype="e4m1"), POW2).sqnr_db
    assert good - one_bit == pytest.approx(12, abs=1)  # 6 dB a bit
    tiny = statistics.cast_error(x * 1e-6, CONTROL_E5M2.grad_output, POW2)
    assert tiny.underflow > 0.9


def test_only_a_control_may_have_other_casts():
    cast = Cast(dtype="e5m2", block=(1, 128))
    with pytest.raises(ValueError, match="only scaled e4m3"):
        FP8Recipe(name="x", summary="", input=cast)
    FP8Recipe(name="x", summary="", input=cast, control=True)


@pytest.mark.parametrize("block", [(1, 128), (128, 128), "tensor"])
@pytest.mark.parametrize("shape", [(256, 320), (200, 130)], ids=["whole blocks", "partial ones"])
def test_matrices_cast_together_have_their_own_statistics(block, shape):
    x = torch.randn(3, *shape).bfloat16() * torch.tensor([1.0, 1e-3, 50.0])[:, None, None]
    x[0, 0] = 0
    together = statistics.sums_of_each(x, Cast(block=block), POW2)
    alone = torch.stack([statistics.sums(each, Cast(block=block), POW2) for each in x])
    assert together.shape == (3, 6)
    assert torch.allclose(together, alone, rtol=1e-12, atol=0)
    for row, each in zip(together, x, strict=True):
        left = each.float() - casts.quantize(each, Cast(block=block), POW2).dequantize()
        assert row[1].item() == pytest.approx(left.square().sum(dtype=torch.float64).item())
