"""The numerics taps on TransformerEngine's layers: what they sample is what TE casts.

The same hooks as on the CPU (tests/megatron/test_compare.py), on TE's modules: a norm inside the linear, and
weights in FP8.
"""

from __future__ import annotations

import json
import statistics as stats

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a Hopper GPU", allow_module_level=True)
te = pytest.importorskip("transformer_engine.pytorch", reason="needs TransformerEngine")

from transformer_engine.common.recipe import Float8BlockScaling, Format  # noqa: E402

from megatron_fp8_ext.fp8 import casts  # noqa: E402
from megatron_fp8_ext.megatron_plugin import taps  # noqa: E402
from megatron_fp8_ext.megatron_plugin.precision import pin_scale_format  # noqa: E402

pytestmark = pytest.mark.gpu
COMMON = ("--use-distributed-optimizer", "--no-gradient-accumulation-fusion")
OPERANDS = {"input rows", "input columns", "weight", "grad rows", "grad columns"}


class Decoder(torch.nn.Module):
    """One layer with a norm inside its linear, named as Megatron names them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Module()])
        self.layers[0].layer_number = 5
        self.layers[0].linear_fc1 = te.LayerNormLinear(
            512, 1024, normalization="RMSNorm", params_dtype=torch.bfloat16, device="cuda"
        )


def test_norm_inside_the_linear_is_part_of_the_operand():
    torch.manual_seed(0)
    model = Decoder()
    layer = model.layers[0].linear_fc1
    with torch.no_grad():
        layer.layer_norm_weight.uniform_(0.5, 2.0)
    x = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    want = torch.nn.functional.rms_norm(x, (512,), layer.layer_norm_weight, layer.eps)
    got = taps._after_norm(layer, x.detach())
    assert torch.allclose(got.float(), want.float(), rtol=2**-7, atol=1e-3)

    recipe = Float8BlockScaling(fp8_format=Format.E4M3)
    pin_scale_format(recipe, True)
    with taps.sampling([model], casts.INFIR2_CASTS) as sampled:
        with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
            y = layer(x)
        y.sum().backward()
    record = sampled.record(1)
    assert record["gemms"] == {"fprop": 1, "dgrad": 1, "wgrad": 1}
    assert {row["operand"] for row in record["layers"]} == OPERANDS
    assert all(row["layer"] == 5 for row in record["layers"])
    # Hooks are gone, and outside of FP8 nothing is counted.
    assert not layer._forward_hooks
    with taps.sampling([model], casts.INFIR2_CASTS) as sampled:
        layer(x).sum().backward()
    assert not sampled.gemms


@pytest.mark.parametrize(
    "layers", [("--no-infir2-fused",), ("--infir2-fused",)], ids=["TE", "fused"]
)
@pytest.mark.parametrize("weights", [(), ("--no-fp8-param-gather",)], ids=["FP8", "BF16"])
def test_a_run_is_sampled_and_its_numbers_stay(weights, layers, train, tmp_path):
    infir2 = (*COMMON, "--fp8-recipe", "infir2", *weights, *layers)
    plain = train(*infir2)
    tapped = train(*infir2, "--fp8-stats-interval", "4", "--fp8-stats-dir", str(tmp_path))
    if layers == ("--no-infir2-fused",):
        assert tapped.losses == plain.losses
    else:  # a sampled iteration's MLP is TransformerEngine's, whose sums may round otherwise
        assert tapped.losses == pytest.approx(plain.losses, rel=2e-3)
    lines = (tmp_path / "fp8_stats-rank0.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [4, 8]
    for line in lines:
        record = json.loads(line)
        # 2 layers x 4 linears x 2 micro-batches
        assert record["gemms"] == {"fprop": 16, "dgrad": 16, "wgrad": 16}
        assert {row["operand"] for row in record["layers"]} == OPERANDS
        for row in record["layers"]:
            assert 25 < row["sqnr_db"] < 40 and row["saturation"] == 0, row
        print(f"iteration {record['iteration']}: {1000 * record['tap_seconds']:.1f} ms in the taps")


@pytest.mark.parametrize("native", ["tensorwise", "delayed"])
def test_megatrons_own_recipes_are_sampled(native, train, tmp_path):
    train(
        *COMMON, "--fp8-recipe", native, "--fp8-format", "hybrid", "--fp8-stats-interval", "8",
        "--fp8-stats-dir", str(tmp_path),
    )  # fmt: skip
    record = json.loads((tmp_path / "fp8_stats-rank0.jsonl").read_text())
    assert record["gemms"]["fprop"] == 16
    inputs = [row["sqnr_db"] for row in record["layers"] if row["operand"] == "input rows"]
    assert stats.fmean(inputs) > 15


def test_control_is_emulated_on_a_gpu_too(train):
    refused = train(*COMMON, "--fp8-recipe", "control-e5m2", ok=False)
    assert refused.code == 2 and "add --fp8-emulate" in refused.said[-1]
    outcome = train(*COMMON, "--fp8-recipe", "control-e5m2", "--fp8-emulate")
    assert outcome.casts["weight"] > 0
