"""The residual in Megatron's own `TransformerLayer`: its real methods and sums, over layers that stand in."""

from __future__ import annotations

import types

import pytest
from fused_cases import random, sqnr
from kernel_cases import torch
from test_fused_layer import (  # noqa: F401
    F,
    H,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
    config,
    seam,
)

from megatron_fp8_ext.fused import residual
from megatron_fp8_ext.fused.gemm import ReferenceGemm
from megatron_fp8_ext.megatron_plugin import fused_layer, run

LAYER = {
    "bias_dropout_fusion": True,
    "fp32_residual_connection": False,
    "inference_fuse_tp_communication": False,
    "mlp_chunks_for_prefill": 1,
    "mlp_chunks_for_training": 1,
    "transformer_impl": "transformer_engine",
    "fp8": "e4m3",
    "fp4": None,
}


class Attention(torch.nn.Module):
    """Norm-QKV, something in between, and the projection; Megatron's has more arguments."""

    def __init__(self, how):
        super().__init__()
        self.linear_qkv = TELayerNormColumnParallelLinear(H, H, how, 5)
        self.linear_proj = TERowParallelLinear(H, H, how, 6)

    def forward(self, hidden_states, **kwargs):
        return self.linear_proj(torch.tanh(self.linear_qkv(hidden_states)[0]))


class Counting(ReferenceGemm):
    added = 0

    def fprop(self, x, weight, bias=None, add=None):
        type(self).added += add is not None
        return super().fprop(x, weight, bias, add)


@pytest.fixture
def layer(seam, monkeypatch):  # noqa: F811
    """A layer with everything patched that `fused` patches."""
    from megatron.core.fusions import fused_bias_dropout as sums
    from megatron.core.transformer import transformer_layer as module
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp

    cls = module.TransformerLayer
    for name in ("_forward_attention", "_forward_mlp"):
        monkeypatch.setattr(cls, name, getattr(cls, name))
    monkeypatch.setattr(sums, "get_bias_dropout_add", sums.get_bias_dropout_add)
    monkeypatch.setattr(fused_layer, "_gemm", Counting)
    monkeypatch.setattr(Counting, "added", 0)
    fused_layer.residual_stream(module)
    fused_layer.residual_add(sums)

    made = cls.__new__(cls)
    torch.nn.Module.__init__(made)
    made.config = config(**LAYER)
    made.hidden_dropout = 0.0
    made.input_layernorm, made.pre_mlp_layernorm = IdentityOp(), IdentityOp()
    made.pre_cross_attn_layernorm, made.cross_attention = IdentityOp(), IdentityOp()
    made.self_attention, made.mlp = Attention(made.config), seam()
    made.self_attn_bda = made.mlp_bda = sums.get_bias_dropout_add
    made.cross_attn_bda = IdentityFuncOp()
    made.bias_dropout_add_exec_handler = torch.enable_grad
    made.recompute_input_layernorm = made.recompute_pre_mlp_layernorm = False
    made.recompute_mlp = made.is_moe_layer = False
    made.off_interface = module._get_offloading_interface()
    made.offload_attn_norm = made.offload_mlp_norm = False
    made.mlp_norm_manager = None
    return made


def step(layer, fused, monkeypatch):
    """(output, gradients) of x, ten per cent of it and each weight."""
    monkeypatch.setattr(run.current, "fused", fused)
    source = random(64, 2, H, seed=1).requires_grad_()
    attention, _ = layer._forward_attention(source * 1, attention_mask=None)
    y = layer._forward_mlp(attention)
    dy = random(64, 2, H, scale=1e-3, seed=9)
    return (y, *torch.autograd.grad(y, (source, *layer.parameters()), dy))


def test_the_layer_is_what_it_was(layer, monkeypatch):
    mine, theirs = step(layer, True, monkeypatch), step(layer, False, monkeypatch)
    assert Counting.added == 2
    for got, want in zip(mine, theirs, strict=True):
        # Megatron's SwiGLU on the CPU rounds twice. A sum left out or made twice has under 6.
        assert sqnr(got.detach(), want.detach()) > 24


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "recompute_mlp", True),
        lambda layer: setattr(layer, "hidden_dropout", 0.1),
        lambda layer: layer.eval(),
        lambda layer: setattr(layer.config, "bias_dropout_fusion", False),
        lambda layer: setattr(layer.config, "fp32_residual_connection", True),
        lambda layer: setattr(layer, "input_layernorm", torch.nn.Identity()),
    ],
    ids=["recompute", "dropout", "eval", "no fusion", "fp32 stream", "norm"],
)
def test_where_the_sum_is_another(layer, change):
    change(layer)
    assert not fused_layer._adds_residual(layer)


def test_a_subclass_is_left_alone(layer, monkeypatch):
    monkeypatch.setattr(layer, "__class__", type("Mine", (type(layer),), {}))
    step(layer, True, monkeypatch)
    assert Counting.added == 0


def test_without_gradients_nothing_is_announced(layer, monkeypatch):
    x = random(64, 2, H, seed=1)
    with torch.no_grad():
        quiet = layer._forward_mlp(x.clone())
    assert Counting.added == 0
    with residual.follows(types.SimpleNamespace(), x):
        assert residual.expected_by(layer.mlp) is None
    assert quiet.shape == x.shape and layer.mlp.linear_fc2.weight.shape == (H, F)
