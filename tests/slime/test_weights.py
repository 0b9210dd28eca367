"""The weight push through slime's own converter, against the codes training's emulated "
"GEMM used, bit for bit."""

from __future__ import annotations

import json

import pytest
import trees

pytest.importorskip("torch")
import torch

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.fp8 import reference
from megatron_fp8_ext.slime_plugin import preflight, weights

CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}

CODE = r"""
import sys, json, torch
from argparse import Namespace
from megatron_fp8_ext.fp8 import reference
from megatron_fp8_ext.slime_plugin import weights
import slime.backends.megatron_utils.megatron_to_hf as hf
u8 = lambda t: t.view(torch.uint8)
out = {}
H, HEADS, KV, D, FFN = 512, 4, 2, 128, 640
args = Namespace(hidden_size=H, num_attention_heads=HEADS, num_query_groups=KV, kv_channels=D, ffn_hidden_size=FFN,
    q_lora_rank=None, vocab_size=1000, num_layers=4, first_last_layers_bf16=False, untie_embeddings_and_output_weights=True,
    swiglu=True, group_query_attention=True)
config = json.loads(sys.argv[1])
torch.manual_seed(0)
for scale_format in ("power_of_two", "float32"):
    out[scale_format] = weights.install(scale_format)
    def push(name, w, config=config):
        return dict(hf.convert_to_hf(args, "qwen2forcausallm", f"module.module.decoder.layers.1.{name}", w, config))
    qkv = (torch.randn((HEADS + 2 * KV) * D, H) * 0.02).bfloat16()
    fc1, fc2 = (torch.randn(2 * FFN, H) * 0.02).bfloat16(), (torch.randn(H, FFN) * 0.02).bfloat16()
    # What training casts: the fused matrices.
    t_qkv, t_fc1, t_fc2 = (reference.quantize_weight(w, scale_format) for w in (qkv, fc1, fc2))
    got = push("self_attention.linear_qkv.weight", qkv)
    L = "model.layers.1."
    parts = {"q": [], "k": [], "v": []}; scales = {"q": [], "k": [], "v": []}
    per = HEADS // KV
    for g in range(KV):
        base = g * (per + 2)
        for key, first, count in (("q", base, per), ("k", base + per, 1), ("v", base + per + 1, 1)):
            parts[key].append(t_qkv.codes[first * D:(first + count) * D]); scales[key].append(t_qkv.scale_inv[first:first + count])
    for key in parts:
        name = f"{L}self_attn.{key}_proj.weight"
        assert torch.equal(u8(got[name]), u8(torch.cat(parts[key]))), name
        assert torch.equal(got[name + "_scale_inv"], torch.cat(scales[key])), name
    got = push("mlp.linear_fc1.weight", fc1)
    for i, key in enumerate(("gate", "up")):
        name = f"{L}mlp.{key}_proj.weight"
        assert torch.equal(u8(got[name]), u8(t_fc1.codes[i * FFN:(i + 1) * FFN])), name
        assert torch.equal(got[name + "_scale_inv"], t_fc1.scale_inv[i * 5:(i + 1) * 5]), name
    got = push("mlp.linear_fc2.weight", fc2)
    assert torch.equal(u8(got[L + "mlp.down_proj.weight"]), u8(t_fc2.codes))
    # FP32 main weights are rounded to BF16 first
    again = push("mlp.linear_fc2.weight", fc2.float() * (1 + 2 ** -10))
    assert torch.equal(u8(again[L + "mlp.down_proj.weight"]), u8(t_fc2.codes))
    # pushed from dequantized FP8 (--fp8-param-gather)
    again = push("mlp.linear_fc2.weight", t_fc2.dequantize(torch.bfloat16))
    back = reference.Quantized(again[L + "mlp.down_proj.weight"], again[L + "mlp.down_proj.weight_scale_inv"], (128, 128))
    assert torch.equal(back.dequantize(torch.bfloat16), t_fc2.dequantize(torch.bfloat16))
    norm = push("mlp.linear_fc1.layer_norm_weight", torch.ones(H).bfloat16())
    assert [t.dtype for t in norm.values()] == [torch.bfloat16]
    bias = push("self_attention.linear_qkv.bias", torch.ones((HEADS + 2 * KV) * D).bfloat16())
    assert {t.dtype for t in bias.values()} == {torch.bfloat16}
    kept = push("mlp.linear_fc2.weight", fc2, {**config, "modules_to_not_convert": [L + "mlp.down_proj"]})
    assert list(kept) == [L + "mlp.down_proj.weight"] and torch.equal(next(iter(kept.values())), fc2)
    assert push("mlp.linear_fc2.weight", fc2, None)[L + "mlp.down_proj.weight"].dtype == torch.bfloat16
print(json.dumps(out))
"""


@pytest.mark.slime
@pytest.mark.parametrize("tree", trees.params())
def test_push_is_bit_for_bit_trainings_cast(tree):
    # `fmt` is left out on purpose: the reference's converter writes none, and its slime then raised a KeyError.
    config = {k: v for k, v in CONFIG.items() if k != "fmt"}
    done = trees.python(tree, CODE, json.dumps(config))
    assert done.returncode == 0, done.stderr[-3000:]
    seams = json.loads(done.stdout.splitlines()[-1])["power_of_two"]
    assert any(name.endswith("megatron_to_hf.quantize_params") for name in seams)


@pytest.mark.parametrize("scale_format", ["power_of_two", "float32"])
def test_casting_dequantized_weights_again_changes_no_value(scale_format):
    """Why --fp8-param-gather may stay: slime then pushes what training's FP8 weights dequantize to."""
    torch.manual_seed(1)
    for std in (1e-4, 0.02, 3.0):
        w = (torch.randn(512, 512) * std).bfloat16()
        w[:128, :128] = w[:128, :128].clamp(-1e-3, 1e-3)
        w[0, 0] = 225 * 2.0**-10 if scale_format == "power_of_two" else w[0, 0]
        once = reference.quantize_weight(w, scale_format)
        again = reference.quantize_weight(once.dequantize(torch.bfloat16), scale_format)
        value = once.dequantize(torch.bfloat16)
        assert torch.equal(again.dequantize(torch.bfloat16), value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("activation_scheme", "static"), ("weight_block_size", [64, 64]), ("fmt", "e5m2")],
)
def test_other_quantizations_are_refused(field, value):
    with pytest.raises(UserError, match=f"has {field}: "):
        weights.check_config({**CONFIG, field: value})


@pytest.mark.parametrize(
    ("entry", "module", "hit"),
    [
        ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj", True),
        ("layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj", True),
        ("model.layers.1.mlp.down_proj", "model.layers.11.mlp.down_proj", False),
        ("mlp", "model.layers.11.mlp.down_proj", True),
        ("lm_head", "model.layers.0.mlp.down_proj", False),
    ],
)
def test_ignore_lists(entry, module, hit):
    config = {**CONFIG, "modules_to_not_convert": [entry]}
    assert weights.skipped(f"{module}.weight", config) is hit


def named(*names):
    return [(f"model.layers.0.{n}.weight", torch.ones(128, 128).bfloat16()) for n in names]


def test_half_of_a_fused_layer_is_refused():
    from argparse import Namespace

    config = {**CONFIG, "ignored_layers": ["model.layers.0.self_attn.q_proj"]}
    pairs = named("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    name = "module.module.decoder.layers.0.self_attention.linear_qkv.weight"
    with pytest.raises(UserError, match="keep all or none"):
        weights.quantize(Namespace(), name, pairs, config, "float32")


def test_layers_trained_in_bf16_must_be_served_so():
    from argparse import Namespace

    args = Namespace(
        first_last_layers_bf16=True, num_layers=4,
        num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1,
    )  # fmt: skip
    name = "module.module.decoder.layers.{}.mlp.linear_fc2.weight"
    with pytest.raises(UserError, match="modules_to_not_convert"):
        weights.quantize(args, name.format(0), named("mlp.down_proj"), CONFIG, "float32")
    inner = weights.quantize(args, name.format(1), named("mlp.down_proj"), CONFIG, "float32")
    assert inner[0][1].dtype == torch.float8_e4m3fn


SHAPE = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


def test_mixed_scales_are_refused_with_the_measured_cost():
    from megatron_fp8_ext.recipe import BF16, INFIR2, INFIR2_RL

    ue8m0 = {**SHAPE, "quantization_config": {**CONFIG, "scale_fmt": "ue8m0"}}
    fp32 = {**SHAPE, "quantization_config": CONFIG}
    assert preflight.rollout_numbers(ue8m0, INFIR2) is None
    assert preflight.rollout_numbers(fp32, INFIR2_RL) is None
    assert "3.7e-2" in preflight.rollout_numbers(ue8m0, INFIR2_RL)
    assert "--scale-format e8m0" in preflight.rollout_numbers(fp32, INFIR2)
    assert "convert hf-to-fp8" in preflight.rollout_numbers(SHAPE, INFIR2)
    assert preflight.rollout_numbers(SHAPE, BF16) is None


def test_the_measured_cost():
    torch.manual_seed(0)
    w = (torch.randn(1024, 1024) * 0.02).bfloat16()
    a, b = (reference.quantize_weight(w, f).dequantize() for f in ("power_of_two", "float32"))
    assert ((a - b).norm() / a.norm()).item() == pytest.approx(3.7e-2, abs=5e-4)


@pytest.mark.parametrize(("tp", "fits"), [(1, True), (2, True), (4, True), (8, False)])
def test_engine_tensor_parallel(tp, fits):
    if fits:
        preflight.refuse_engine_tp(SHAPE, tp)
    else:
        with pytest.raises(UserError, match="use 1 or 2 or 4"):
            preflight.refuse_engine_tp(SHAPE, tp)


def test_blocks_agree_for_qwen_7b_at_tp4_and_not_for_heads_of_64():
    assert preflight.block_mismatch(SHAPE, 4) is None
    assert "key and value rows" in preflight.block_mismatch({**SHAPE, "head_dim": 64}, 1)


def test_unsafe_loading_remote_code_and_open_hosts_are_refused(tmp_path):
    from argparse import Namespace

    with pytest.raises(UserError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        preflight.refuse_unsafe_loading({"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"})
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.Config"}}')
    with pytest.raises(UserError, match="auto_map"):
        preflight.refuse_remote_code(tmp_path)
    with pytest.raises(UserError, match=r"0\.0\.0\.0"):
        preflight.refuse_open_hosts(Namespace(sglang_router_ip="0.0.0.0"))


LOCAL = r"""
import torch
from argparse import Namespace
from megatron_fp8_ext.slime_plugin import local_layers
import slime.backends.megatron_utils.megatron_to_hf as hf
print(local_layers.install())
args = Namespace(hidden_size=128, num_attention_heads=1, num_query_groups=1, kv_channels=128, q_lora_rank=None, vocab_size=128)
def push(name):
    return [n for n, _ in hf.convert_to_hf(args, "qwen2config", "module.module.decoder.layers.3." + name, torch.ones(128))]
assert push("input_layernorm.weight") == ["model.layers.3.input_layernorm.weight"]
assert push("pre_mlp_layernorm.weight") == ["model.layers.3.post_attention_layernorm.weight"]
assert push("mlp.linear_fc1.layer_norm_weight") == ["model.layers.3.post_attention_layernorm.weight"]
try:
    from slime.backends.megatron_utils.hf_to_megatron import _LOADERS
except ModuleNotFoundError:
    _LOADERS = None
if _LOADERS is not None:
    class Reader:
        def get_tensor(self, name):
            return name
    found = _LOADERS["qwen2"]("module.module.decoder.layers.0.input_layernorm.weight", Reader(), None)
    assert found == "model.layers.0.input_layernorm.weight", found
"""


@pytest.mark.slime
@pytest.mark.parametrize("tree", trees.params())
def test_norms_of_local_layers_are_loaded_and_pushed(tree):
    done = trees.python(tree, LOCAL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "megatron_to_hf.convert_qwen2_to_hf" in done.stdout


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        (
            "a.decoder.layers.0.input_layernorm.weight",
            "self_attention.linear_qkv.layer_norm_weight",
        ),
        ("decoder.layers.12.pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ],
)
def test_fused_names(name, fused):
    from megatron_fp8_ext.slime_plugin import local_layers

    assert local_layers.fused_name(name).endswith(fused)
    assert local_layers.fused_name("decoder.final_layernorm.weight").startswith("decoder.final")
