"""Write SmolLM2-135M-Instruct as a Hugging Face folder in BF16, and as a Qwen2 in block FP8.

Run by the Python of the serving environment: make_models.py FILE.gguf FOLDER. SmolLM2 is a Llama, and
a Qwen2 whose QKV biases are zero computes the same. Its widths are no multiples of 128, which FP8
loaders want, so zero channels and zero heads are added: 576 -> 768, 9 -> 12 heads, 3 -> 4 groups. They
change no output once RMSNorm's weights allow for the longer mean. WHOLE_BLOCKS widens the heads instead.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from megatron_fp8_ext.fp8.reference import quantize_weight

HEAD = 64  # of SmolLM2


@dataclass(frozen=True)
class Shape:
    """Sizes of the Qwen2."""

    hidden: int = 768
    heads: int = 12
    groups: int = 4
    head: int = HEAD


# Every 128 x 128 block of the fused matrices is one of the split ones, as RL needs it (docs/rl.md).
WHOLE_BLOCKS = Shape(hidden=640, heads=9, groups=3, head=128)


def wider_heads(weight: torch.Tensor, head: int) -> torch.Tensor:
    """Spread rows `[heads * HEAD, cols]` over heads of `head`; pair j of RoPE becomes pair 2j."""
    step = head // HEAD
    old = weight.reshape(-1, 2, HEAD // 2, weight.shape[1])
    new = torch.zeros(len(old), 2, HEAD // 2, step, weight.shape[1], dtype=weight.dtype)
    new[:, :, :, 0] = old
    return new.reshape(-1, weight.shape[1])


def pad(weight: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    return torch.nn.functional.pad(weight, (0, cols - weight.shape[1], 0, rows - weight.shape[0]))


def as_qwen2(llama: torch.nn.Module, shape: Shape = Shape()) -> Qwen2ForCausalLM:
    old = llama.config
    hidden, query, key = shape.hidden, shape.heads * shape.head, shape.groups * shape.head
    rope = getattr(old, "rope_parameters", None) or {"rope_theta": old.rope_theta}
    config = Qwen2Config(
        vocab_size=old.vocab_size,
        hidden_size=hidden,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        head_dim=shape.head,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps * old.hidden_size / hidden,
        rope_parameters={"rope_type": "default", "rope_theta": rope["rope_theta"]},
        tie_word_embeddings=True,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
    )
    sizes = {
        "q_proj": (query, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (old.intermediate_size, hidden),
        "up_proj": (old.intermediate_size, hidden),
        "down_proj": (hidden, old.intermediate_size),
        "embed_tokens": (old.vocab_size, hidden),
        "lm_head": (old.vocab_size, hidden),
    }
    new = {}
    for name, weight in llama.state_dict().items():
        kind = name.split(".")[-2]
        if kind in ("q_proj", "k_proj", "v_proj"):
            weight = wider_heads(weight, shape.head)
        elif kind == "o_proj":
            weight = wider_heads(weight.T, shape.head).T
        if kind == "q_proj":  # scores are divided by the root of the head size
            weight = weight * math.sqrt(shape.head / HEAD)
        if kind in sizes:
            new[name] = pad(weight, *sizes[kind])
        else:  # an RMSNorm: the mean of squares now runs over more channels
            scaled = weight.float() * math.sqrt(old.hidden_size / hidden)
            new[name] = torch.nn.functional.pad(scaled, (0, hidden - len(weight)))
    for layer in range(old.num_hidden_layers):
        for kind in ("q_proj", "k_proj", "v_proj"):
            key = f"model.layers.{layer}.self_attn.{kind}"
            new[f"{key}.bias"] = torch.zeros(len(new[f"{key}.weight"]))
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict({name: weight.to(torch.bfloat16) for name, weight in new.items()})
    return model


def save_fp8(model: Qwen2ForCausalLM, folder: Path) -> None:
    """In the layout that slime, SGLang, vLLM and transformers read as `quant_method: fp8`."""
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if name.endswith("proj.weight"):
            cast = quantize_weight(weight, "power_of_two")
            tensors[name] = cast.codes
            tensors[f"{name}_scale_inv"] = cast.scale_inv
        else:
            tensors[name] = weight
    import json

    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string())
    config["architectures"] = ["Qwen2ForCausalLM"]
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def main(gguf: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    llama = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    llama.config.quantization_config = None
    del llama.config.quantization_config
    llama.save_pretrained(folder / "bf16")
    save_fp8(as_qwen2(llama), folder / "fp8")
    for name in ("bf16", "fp8"):
        tokenizer.save_pretrained(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
