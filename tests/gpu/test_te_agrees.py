"""TransformerEngine on a Hopper GPU computes what fp8/reference.py specifies.

Codes and scales bit for bit, on random data and on every edge case; layer outputs and gradients
within 40 dB of the emulated layer, which differs only in the order of summation.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a Hopper GPU", allow_module_level=True)
te = pytest.importorskip("transformer_engine.pytorch", reason="needs TransformerEngine")

import transformer_engine_torch as tex  # noqa: E402
from transformer_engine.common.recipe import Float8BlockScaling, Format  # noqa: E402
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import (  # noqa: E402
    Float8BlockQuantizer,
)

from megatron_fp8_ext.fp8 import emulation, reference  # noqa: E402
from megatron_fp8_ext.fp8.error import sqnr_db  # noqa: E402
from megatron_fp8_ext.megatron_plugin.precision import pin_scale_format  # noqa: E402

pytestmark = pytest.mark.gpu
FORMATS = ("power_of_two", "float32")


def edge_cases() -> dict[str, torch.Tensor]:
    """Matrices `[256, 512]` whose blocks hold one edge case each."""
    torch.manual_seed(7)
    x = torch.randn(256, 512)
    cases = {
        "random": x,
        "wide range": x * torch.exp(4 * torch.randn(256, 512)),
        "zero blocks": torch.where(torch.arange(512) // 128 % 2 == 0, 0.0, x),
        "exact powers of two": torch.exp2(torch.randint(-20, 20, (256, 512)).float()),
        "amax just above a power": x.clamp(-1, 1) * (1 + 2**-7) * 448,
        "tiny": x * 1e-38,
        "huge": x * 5e37,
        "infinite": x.clone(),
        "not a number": x.clone(),
    }
    cases["infinite"][5, 130] = float("inf")
    cases["infinite"][200, 3] = float("-inf")
    cases["not a number"][9, 300] = float("nan")
    return cases


def te_quantize(x, block_dim, power_of_two, columnwise):
    quantizer = Float8BlockQuantizer(
        fp8_dtype=tex.DType.kFloat8E4M3,
        rowwise=True,
        columnwise=columnwise,
        force_pow_2_scales=power_of_two,
        block_scaling_dim=block_dim,
    )
    return quantizer(x)


def unpack(data, scale_inv, shape, block):
    """Undo TE's GEMM-ready layout of 1x128 scales: transposed, padded to four."""
    rows, cols = shape
    grid = (-(-rows // block[0]), -(-cols // block[1]))
    scales = scale_inv.t() if block[0] == 1 else scale_inv
    return data.view(torch.uint8)[:rows, :cols], scales[: grid[0], : grid[1]].contiguous()


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("case", edge_cases())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [(1, 128), (128, 128)])
def test_casts_agree_bitwise(case, scale_format, dtype, block):
    x = edge_cases()[case].to("cuda", dtype)
    pow2 = scale_format == "power_of_two"
    got = te_quantize(x, 1 if block[0] == 1 else 2, pow2, columnwise=True)
    want = reference.quantize(x, block, scale_format)
    codes, scales = unpack(got._rowwise_data, got._rowwise_scale_inv, x.shape, block)
    assert torch.equal(scales.view(torch.int32), want.scale_inv.view(torch.int32))
    assert torch.equal(codes, want.codes.view(torch.uint8))
    if block[0] == 1:
        want = reference.quantize_columns(x, scale_format)
        codes, scales = unpack(got._columnwise_data, got._columnwise_scale_inv, x.t().shape, block)
        assert torch.equal(scales.view(torch.int32), want.scale_inv.view(torch.int32))
        assert torch.equal(codes, want.codes.view(torch.uint8))


@pytest.mark.parametrize("shape", [(144, 208), (400, 1040)])
def test_partial_blocks_agree_bitwise(shape):
    torch.manual_seed(1)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    for block in ((1, 128), (128, 128)):
        got = te_quantize(x, 1 if block[0] == 1 else 2, True, columnwise=False)
        want = reference.quantize(x, block, "power_of_two")
        codes, scales = unpack(got._rowwise_data, got._rowwise_scale_inv, shape, block)
        assert torch.equal(scales, want.scale_inv)
        assert torch.equal(codes, want.codes.view(torch.uint8))


@pytest.mark.parametrize("scale_format", FORMATS)
def test_layer_agrees_with_emulation_within_40_db(scale_format):
    torch.manual_seed(3)
    layer = te.Linear(1536, 2048, bias=True, params_dtype=torch.bfloat16, device="cuda")
    recipe = Float8BlockScaling(fp8_format=Format.E4M3)
    pin_scale_format(recipe, scale_format == "power_of_two")
    x = torch.randn(512, 1536, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(512, 2048, device="cuda", dtype=torch.bfloat16) * 1e-3
    with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
        y = layer(x)
    y.backward(dy)
    te_results = (y, x.grad, layer.weight.grad, layer.bias.grad)

    x2 = x.detach().clone().requires_grad_()
    weight = layer.weight.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    y2 = emulation.EmulatedLinear.apply(x2, weight, bias, False, False, None, scale_format)
    y2.backward(dy)
    for name, ours, theirs in zip(
        ("output", "dgrad", "wgrad", "bias grad"),
        (y2, x2.grad, weight.grad, bias.grad),
        te_results,
        strict=True,
    ):
        quality = sqnr_db(theirs, ours)
        print(f"{scale_format} {name}: {quality:.1f} dB")
        assert quality >= 40, (name, quality)
    # And the recipe really quantized: BF16 itself is much further away than the emulation.
    assert sqnr_db(te_results[0], torch.nn.functional.linear(x, layer.weight, layer.bias)) < 40
