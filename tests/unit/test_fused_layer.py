"""The seam of the fused path: real `MLP` of Megatron, over layers that stand in for TransformerEngine's.

TransformerEngine needs a GPU even to be imported, so its two linear layers are played by torch modules with
the attributes that the seam reads, computing unfused by emulation. tests/gpu has the real ones.
"""

from __future__ import annotations

import sys
import types

import pytest
from fused_cases import EPS, linear, random, sqnr, unfused_linear, unfused_norm
from kernel_cases import DEVICE, torch

pytest.importorskip("megatron.core")
if DEVICE != "cpu":
    pytest.skip("on a GPU tests/gpu has the real layers", allow_module_level=True)

from megatron_fp8_ext.fused.gemm import ReferenceGemm
from megatron_fp8_ext.megatron_plugin import fused_layer, fused_rules, run, te_gemm
from megatron_fp8_ext.recipe import get_recipe

H, F = 256, 256


class State:
    """FP8GlobalStateManager, as far as it is asked."""

    enabled = True
    recipe = types.SimpleNamespace(float8_block_scaling=lambda: True, backward_override=None)
    is_fp8_enabled = classmethod(lambda cls: cls.enabled)
    get_fp8_recipe = classmethod(lambda cls: cls.recipe)
    is_fp8_calibration = classmethod(lambda cls: False)
    fp8_graph_capturing = classmethod(lambda cls: False)


class Layer(torch.nn.Module):
    """What both of TransformerEngine's linear layers have."""

    normalization, zero_centered_gamma, return_layernorm_output = "RMSNorm", False, False
    weight_names, te_quant_params, te_return_bias = ("weight",), None, False
    fsdp_group, is_fsdp2, symmetric_ar_type, tp_size, eps = None, False, None, 1, EPS
    disable_parameter_transpose_cache, is_first_microbatch = False, True

    def __init__(self, n, k, config, seed):
        super().__init__()
        self.config = config
        self.weight = torch.nn.Parameter(random(n, k, scale=0.05, seed=seed))
        self.use_bias, self.calls = False, []
        self.wgrad_store = types.SimpleNamespace(delay_wgrad_compute=lambda: False)
        self.sequence_parallel, self.tp_group = False, None

    def prepare_forward(self, x):
        self.calls.append("prepare")
        return x

    def end_forward(self):
        self.calls.append("end")


class TELayerNormColumnParallelLinear(Layer):
    parallel_mode = "column"

    def __init__(self, *args):
        super().__init__(*args)
        self.layer_norm_weight = torch.nn.Parameter(1 + random(self.weight.shape[1], scale=0.1))

    def forward(self, x):
        self.calls.append("native")
        normed = unfused_norm(x, self.layer_norm_weight)
        return unfused_linear(normed, self.weight, None, "power_of_two"), None


class TELinear(Layer):
    parallel_mode = "row"

    def forward(self, x):
        self.calls.append("native")
        return unfused_linear(x, self.weight, None, "power_of_two"), None


class TERowParallelLinear(TELinear):
    pass


def config(**changes):
    values = {
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "use_te_activation_func": False,
        "activation_func_clamp_value": None,
        "glu_linear_offset": 0.0,
        "activation_func_fp8_input_store": False,
        "add_bias_linear": False,
        "bias_activation_fusion": False,
        "cpu_offloading": False,
        "cuda_graph_impl": "none",
    }
    return types.SimpleNamespace(**{**values, **changes})


@pytest.fixture
def seam(monkeypatch):
    """The patched classes; returns a maker of MLPs."""
    from megatron.core.transformer import mlp as module

    for name, contents in {
        "transformer_engine": {},
        "transformer_engine.pytorch": {},
        "transformer_engine.pytorch.quantization": {"FP8GlobalStateManager": State},
        "transformer_engine.debug": {},
        "transformer_engine.debug.pytorch": {},
        "transformer_engine.debug.pytorch.debug_state": {
            "TEDebugState": types.SimpleNamespace(debug_enabled=False)
        },
    }.items():
        fake = types.ModuleType(name)
        fake.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(fused_rules, "machine_gap", lambda: None)
    monkeypatch.setattr(fused_layer, "_gemm", ReferenceGemm)
    monkeypatch.setattr(fused_layer, "_counts", fused_layer.Counter())
    monkeypatch.setattr(
        te_gemm, "weight_operand", lambda m, first: linear(m.weight, "power_of_two").operand
    )
    monkeypatch.setattr(run, "current", run.Run(recipe=get_recipe("infir2"), fused=True))
    monkeypatch.setattr(State, "enabled", True)
    monkeypatch.setattr(module.MLP, "forward", module.MLP.forward)
    for kind in (TELayerNormColumnParallelLinear, TELinear):
        monkeypatch.setattr(kind, "forward", kind.forward)
    fused_layer.mlp(module)
    fused_layer.te_linears(sys.modules[__name__])

    def make(**changes):
        how = config(**changes)
        made = module.MLP.__new__(module.MLP)
        torch.nn.Module.__init__(made)
        made.config, made.activation_func = how, how.activation_func
        made.linear_fc1 = TELayerNormColumnParallelLinear(2 * F, H, how, 3)
        made.linear_fc2 = TERowParallelLinear(H, F, how, 4)
        return made

    return make


def test_a_megatron_without_te_is_left_alone():
    """Its classes are mocks, and the driver of a Ray job imports them all the same."""
    from megatron.core.extensions import transformer_engine as module

    if module.HAVE_TE:
        pytest.skip("TransformerEngine is here")
    fused_layer.te_linears(module)


def both_ways(layer, x, monkeypatch):
    """(output, gradients) fused and native; each from fresh gradients."""
    found = []
    for fused in (True, False):
        monkeypatch.setattr(run.current, "fused", fused)
        leaf = x.detach().requires_grad_()
        y = layer(leaf)[0]
        found.append(
            (y, *torch.autograd.grad(y.float().square().sum(), (leaf, *layer.parameters())))
        )
    return found


def test_mlp(seam, monkeypatch):
    layer, x = seam(), random(16, 2, H, seed=1)
    mine, theirs = both_ways(layer, x, monkeypatch)
    for got, want in zip(mine, theirs, strict=True):
        # Megatron's own SwiGLU on the CPU rounds twice, and flips codes by it; a wrong wire has under 10.
        assert sqnr(got.detach(), want.detach()) > 30
    for linear_layer in (layer.linear_fc1, layer.linear_fc2):
        assert linear_layer.calls == ["prepare", "end", "native"]
    assert fused_layer.summary() == "fused layers: MLP 1 of 1"


def test_linears(seam, monkeypatch):
    how = config()
    x = random(16, 2, H, seed=1)
    for layer in (
        TELayerNormColumnParallelLinear(320, H, how, 3),
        TERowParallelLinear(192, H, how, 3),
    ):
        mine, theirs = both_ways(layer, x, monkeypatch)
        for got, want in zip(mine, theirs, strict=True):
            assert sqnr(got.detach(), want.detach()) > 40
        assert layer.calls == ["prepare", "end", "native"]
    plain = TELinear(192, H, how, 3)
    plain(x)
    assert plain.calls == ["native"]
    assert fused_layer.summary() == "fused layers: norm + linear 1 of 1, linear 1 of 1"


def test_bf16_layers_and_runs_without_it_are_native(seam, monkeypatch):
    layer, x = seam(), random(16, 1, H)
    monkeypatch.setattr(State, "enabled", False)
    layer(x)
    monkeypatch.setattr(State, "enabled", True)
    monkeypatch.setattr(run.current, "fused", False)
    layer(x)
    assert layer.linear_fc1.calls == ["native", "native"] and fused_layer.summary() is None


def test_first_micro_batch_overwrites_and_the_next_one_adds(seam):
    layer, x = seam(), random(16, 2, H, seed=1)
    weight = layer.linear_fc2.weight
    for parameter in (weight, layer.linear_fc1.weight):
        parameter.grad_added_to_main_grad = False
        parameter.main_grad = torch.full(parameter.shape, 7.0)
    layer(x)[0].sum().backward()
    once = weight.main_grad.clone()
    assert weight.grad_added_to_main_grad and not layer.linear_fc2.is_first_microbatch
    layer(x)[0].sum().backward()
    torch.testing.assert_close(weight.main_grad, 2 * once)
    assert once.abs().mean() > 0


def test_hooks(seam):
    layer, x = seam(), random(16, 1, H)
    waited = []

    def wait(module, *unused):
        waited.append(type(module).__name__)

    wait.__module__ = "megatron.core.distributed.distributed_data_parallel"
    for part in (layer.linear_fc1, layer.linear_fc2):
        part.register_forward_pre_hook(wait)
    layer(x)
    assert waited == ["TELayerNormColumnParallelLinear", "TERowParallelLinear"]
    assert "native" not in layer.linear_fc1.calls
    # Somebody who wants to see the tensors in between gets them, from two linear layers.
    seen = []
    handle = layer.linear_fc2.register_forward_hook(lambda _, args, y: seen.append(args[0].shape))
    layer(x)
    assert seen == [(16, 1, F)]
    handle.remove()
    layer(x)
    assert len(seen) == 1
    assert fused_layer.summary() == (
        "fused layers: norm + linear 1 of 1, linear 1 of 1, MLP 1 of 1"
    )


def test_stash(seam, monkeypatch):
    layer, x = seam(), random(16, 2, H, seed=1).requires_grad_()
    plain = layer(x)[0]
    monkeypatch.setattr(run.current, "stash", True)
    stashed = layer(x)[0]
    assert torch.equal(plain, stashed)
    grads = [
        torch.autograd.grad(y.float().sum(), layer.linear_fc1.weight)[0] for y in (plain, stashed)
    ]
    assert 26 < sqnr(grads[1], grads[0]) < 60
    assert fused_layer.summary().endswith("fc1's output kept in 8 bits")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gated_linear_unit": False}, "not SwiGLU"),
        ({"activation_func": torch.nn.functional.gelu}, "not SwiGLU"),
        ({"activation_func_clamp_value": 7.0}, "clamped"),
        ({"activation_func_fp8_input_store": True}, "own FP8 store"),
        ({"add_bias_linear": True}, "a bias"),
        ({"use_te_activation_func": True}, "TransformerEngine's activation"),
        ({"cpu_offloading": True}, "fc1: activation offloading"),
        ({"cuda_graph_impl": "local"}, "fc1: CUDA graphs"),
    ],
)
def test_reasons_of_an_mlp(seam, changes, reason):
    assert reason in fused_rules.why_not(seam(**changes), "MLP")


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("normalization", "LayerNorm", "normalization LayerNorm"),
        ("zero_centered_gamma", True, "centred at zero"),
        ("te_return_bias", True, "bias is returned"),
        ("parallel_mode", None, "not column-parallel"),
        ("te_quant_params", object(), "per-module quantization"),
        ("ub_overlap_ag_fprop", True, "communication overlap"),
        ("weight_names", ["q", "k"], "several pieces"),
        ("is_fsdp2", True, "FSDP"),
        ("symmetric_ar_type", "two_shot", "symmetric-memory"),
    ],
)
def test_reasons_of_a_norm_and_linear(seam, attribute, value, reason):
    layer = TELayerNormColumnParallelLinear(320, H, config(), 3)
    assert fused_rules.why_not(layer, "norm + linear") is None
    setattr(layer, attribute, value)
    assert reason in fused_rules.why_not(layer, "norm + linear")


def test_reasons_in_the_summary(seam):
    x = random(16, 1, H)
    seam()(x)
    seam(add_bias_linear=True).linear_fc1(x)
    layer = seam(cpu_offloading=True)
    layer(x)
    assert "native" in layer.linear_fc1.calls
    line = fused_layer.summary()
    assert "MLP 1 of 2 (1: fc1: activation offloading)" in line
    assert "norm + linear 1 of 2 (1: activation offloading)" in line


def test_tokens(seam):
    layer = TERowParallelLinear(192, H, config(), 3)
    fits = fused_rules.tokens_do_not_fit
    assert fits(random(16, 1, H), layer, "linear") is None
    assert "15 tokens" in fits(random(15, 1, H), layer, "linear")
    assert "float32" in fits(torch.zeros(16, 1, H), layer, "linear")
    layer.tp_size, layer.sequence_parallel = 2, True
    assert "multiple of 128" in fits(random(128, 1, H), layer, "linear")
    assert fits(random(256, 1, H), layer, "linear") is None
    assert fits(random(128, 1, H), layer, "MLP") is None
