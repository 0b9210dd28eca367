"""An FP8 folder obeys what SGLang's and vLLM's loaders require; the rules restated from their sources.

SGLang 0.5.23: srt/layers/quantization/fp8.py (Fp8Config.from_config, validate_block_quant_shapes,
create_fp8_weight_) and utils.py (is_layer_skipped). vLLM: layers/quantization/fp8.py (Fp8Config.from_config,
Fp8LinearMethod.create_weights) and utils/quant_utils.py (is_layer_skipped).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
pytest.importorskip("safetensors")
import hf_models  # noqa: E402
from safetensors import safe_open  # noqa: E402

from megatron_fp8_ext.checkpoint import fp8  # noqa: E402

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path):
    config = hf_models.ALIGNED | {"tie_word_embeddings": request.param}
    source = hf_models.make(tmp_path / "hf", config)
    fp8.hf_to_fp8(source, tmp_path / "fp8", shard_bytes=500_000)
    return tmp_path / "fp8"


def stored(folder: Path) -> dict[str, tuple[str, list[int]]]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                piece = tensors.get_slice(name)
                found[name] = (piece.get_dtype(), piece.get_shape())
    return found


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def fused_layers(config: dict) -> dict[str, tuple[list[int], int]]:
    """Linear layers as the servers build them: (rows of each part, columns)."""
    h, f, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    found = {}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        found |= {
            f"{at}.self_attn.qkv_proj": ([q, kv, kv], h),
            f"{at}.self_attn.o_proj": ([h], q),
            f"{at}.mlp.gate_up_proj": ([f, f], h),
            f"{at}.mlp.down_proj": ([h], f),
        }
    return found


def sglang_ignored(config: dict) -> list[str]:
    names = config.get("ignored_layers") or config.get("modules_to_not_convert") or []
    bare = [name.removeprefix("model.") for name in names]
    return [*bare, *(f"model.{name}" for name in bare)]


def sglang_skips(layer: str, ignored: list[str]) -> bool:
    def matches(name: str) -> bool:
        return any(f".{entry}." in f".{name}." for entry in ignored)

    last = layer.rpartition(".")[2]
    parts = {matches(layer.replace(last, part)) for part in PACKED.get(last, [last])}
    assert len(parts) == 1, "all parts of a fused layer alike"
    return parts.pop()


def vllm_skips(layer: str, ignored: list[str]) -> bool:
    last = layer.rpartition(".")[2]
    parts = {layer.replace(last, part) in ignored for part in PACKED.get(last, [last])}
    assert len(parts) == 1
    return parts.pop()


def test_configuration(folder):
    config = settings(folder)
    assert "fp8" in config["quant_method"] and "mxfp8" not in config["quant_method"]
    assert config["activation_scheme"] == "dynamic", "the only one for blocks"
    assert config["weight_block_size"] == [128, 128]
    assert config["fmt"] == "e4m3", "slime asserts it"
    assert config["scale_fmt"] == "ue8m0", "SGLang then casts activations with powers of two too"


def test_every_linear_layer_is_loaded_as_fp8_and_nothing_else(folder):
    model = json.loads((folder / "config.json").read_text())
    ignored = settings(folder)["ignored_layers"]
    for layer in fused_layers(model):
        assert not sglang_skips(layer, sglang_ignored(settings(folder)))
        assert not vllm_skips(layer, ignored)
    assert sglang_skips("lm_head", sglang_ignored(settings(folder)))
    assert vllm_skips("lm_head", ignored)
    # A reader that treats each entry as a substring must find no linear layer either.
    assert not any(name in layer for name in ignored for layer in fused_layers(model))


@pytest.mark.parametrize("tp", [1, 2])
def test_parameters_fill_what_the_loaders_allocate(folder, tp):
    """Weight E4M3 [sum of parts, K]; scale_inv FP32 [ceil, ceil]; each part on a block border."""
    found, model = stored(folder), json.loads((folder / "config.json").read_text())
    for layer, (parts, columns) in fused_layers(model).items():
        last = layer.rpartition(".")[2]
        row_parallel = last in ("o_proj", "down_proj")
        if len(parts) > 1 or (tp > 1 and not row_parallel):
            assert all(rows // tp % 128 == 0 for rows in parts)
        if tp > 1 and row_parallel:
            assert columns // tp % 128 == 0
        scales = 0
        for part, rows in zip(PACKED.get(last, [last]), parts, strict=True):
            name = f"{layer.rpartition('.')[0]}.{part}.weight"
            assert found.pop(name) == ("F8_E4M3", [rows, columns])
            dtype, shape = found.pop(f"{name}_scale_inv")
            assert dtype == "F32" and shape == [-(-rows // 128), -(-columns // 128)]
            scales += shape[0]
        assert scales == -(-sum(parts) // 128), "scales of the parts are the fused layer's"
    assert all(dtype == "BF16" for dtype, _ in found.values())
    assert ("lm_head.weight" in found) == (not model["tie_word_embeddings"])
