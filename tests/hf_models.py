"""Small Hugging Face folders for tests: random weights, real file layouts, written by `safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Every linear width a multiple of 128 and heads of 128: what transformers, SGLang and vLLM can read,
# and where blocks are training's own.
ALIGNED: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
}
# Qwen2.5-0.5B's kind of trouble: small heads, widths that end inside a block, a vocabulary to pad.
ODD = ALIGNED | {
    "hidden_size": 192,
    "intermediate_size": 304,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 500,
}
LLAMA = ALIGNED | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN3 = ALIGNED | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
UNTIED = {"tie_word_embeddings": False}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers has them, spelled out anew."""
    h, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    d = config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        found |= {
            f"{at}.input_layernorm.weight": (h,),
            f"{at}.self_attn.q_proj.weight": (q, h),
            f"{at}.self_attn.k_proj.weight": (kv, h),
            f"{at}.self_attn.v_proj.weight": (kv, h),
            f"{at}.self_attn.o_proj.weight": (h, q),
            f"{at}.post_attention_layernorm.weight": (h,),
            f"{at}.mlp.gate_proj.weight": (f, h),
            f"{at}.mlp.up_proj.weight": (f, h),
            f"{at}.mlp.down_proj.weight": (h, f),
        }
        if config["model_type"] == "qwen2":
            found |= {f"{at}.self_attn.{x}_proj.bias": (q if x == "q" else kv,) for x in "qkv"}
        if config["model_type"] == "qwen3":
            found |= {f"{at}.self_attn.{x}_norm.weight": (d,) for x in "qk"}
    found["model.norm.weight"] = (h,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (v, h)
    return found


def make(path: Path, config: dict[str, Any], shards: int = 1, seed: int = 0) -> Path:
    """Write a folder with random BF16 weights of trained models' sizes, and a tokenizer file."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(config).items():
        value = torch.randn(shape, generator=generator) * 0.05
        if "norm" in name:
            value = 1 + value
        state[name] = value.to(torch.bfloat16)
    path.mkdir(parents=True)
    save(path, state, shards, save_file)
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text("{}")
    (path / "merges.txt").write_text("a b\n")
    return path


def save(path: Path, state: dict[str, Any], shards: int, save_file: Any) -> None:
    if shards == 1:
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(state)
    files = {
        f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)
    }
    for file, part in files.items():
        save_file({n: state[n] for n in part}, path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in files.items() for name in part}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
