"""The emulated reference: a transformers model whose linear layers compute as Megatron's do under infir2.

Hugging Face weights in, fused and sharded here anew (not by the converter): QKV interleaved by group, gate
and up fused, each tensor-parallel rank its own shard with its own 128x128 blocks. Norms round once, as
torch's and Megatron's do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_fp8_ext.fp8.emulation import EmulatedLinear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: str) -> Tensor:
    if recipe == "bf16":
        return nn.functional.linear(x, weight, bias)
    scales = {"infir2": "power_of_two", "infir2-rl": "float32"}[recipe]
    return EmulatedLinear.apply(x, weight, bias, False, False, None, scales)


class Column(nn.Module):
    """Column parallel: each rank has rows of every part, cast together; returns the parts."""

    def __init__(self, parts: list[nn.Linear], groups: int, tp: int, recipe: str) -> None:
        super().__init__()
        self.rows = [p.weight.shape[0] for p in parts]
        self.groups, self.tp, self.recipe = groups, tp, recipe
        self.weight = self.fuse([p.weight for p in parts])
        self.bias = self.fuse([p.bias for p in parts]) if parts[0].bias is not None else None

    def fuse(self, tensors: list[Tensor]) -> Tensor:
        """Cut each part into groups and put the groups side by side."""
        cut = [t.detach().reshape(self.groups, -1, *t.shape[1:]) for t in tensors]
        return torch.cat(cut, dim=1).flatten(0, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        weights = self.weight.chunk(self.tp)
        biases = self.bias.chunk(self.tp) if self.bias is not None else [None] * self.tp
        y = torch.cat(
            [linear(x, w, b, self.recipe) for w, b in zip(weights, biases, strict=True)], dim=-1
        )
        y = y.unflatten(-1, (self.groups, -1))
        return [p.flatten(-2) for p in y.split([r // self.groups for r in self.rows], dim=-1)]


class Row(nn.Module):
    """Row parallel: each rank has columns; the outputs are summed in BF16."""

    def __init__(self, inner: nn.Linear, tp: int, recipe: str) -> None:
        super().__init__()
        self.weight, self.tp, self.recipe = inner.weight.detach(), tp, recipe

    def forward(self, x: Tensor) -> Tensor:
        shards = zip(x.chunk(self.tp, -1), self.weight.chunk(self.tp, 1), strict=True)
        total, *others = [
            linear(a.contiguous(), w.contiguous(), None, self.recipe) for a, w in shards
        ]
        for other in others:
            total = total + other
        return total


class Part(nn.Module):
    """Stands where transformers has one of the fused layers; the first one computes all."""

    def __init__(self, fused: Column, index: int, shared: dict[str, Any]) -> None:
        super().__init__()
        self.index, self._fused, self._shared = index, [fused], shared

    def forward(self, x: Tensor) -> Tensor:
        if self.index == 0:
            self._shared["parts"] = self._fused[0](x)
        return self._shared["parts"][self.index]


def convert(model: Any, tp: int, recipe: str) -> Any:
    """Replace the linear layers and norms of a Qwen2 or Llama model in place."""
    groups = model.config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv, gate_up = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
        # A rank's shard of gate and up is its piece of gate, then its piece of up: as groups, tp of them.
        for module, names, parts in ((attention, qkv, groups), (mlp, gate_up, tp)):
            fused = Column([getattr(module, n) for n in names], parts, tp, recipe)
            shared: dict[str, Any] = {}
            for index, name in enumerate(names):
                setattr(module, name, Part(fused, index, shared))
        attention.o_proj = Row(attention.o_proj, tp, recipe)
        mlp.down_proj = Row(mlp.down_proj, tp, recipe)
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, norm(getattr(layer, name)))
    model.model.norm = norm(model.model.norm)
    return model


def norm(theirs: Any) -> nn.Module:
    ours = nn.RMSNorm(
        theirs.weight.shape[0], eps=theirs.variance_epsilon, dtype=theirs.weight.dtype
    )
    ours.weight = theirs.weight
    return ours


def loss(model: Any, tokens: Tensor) -> float:
    """Mean cross-entropy of `[S]` tokens that repeat for ever: each token's label is the next one."""
    with torch.no_grad():
        logits = model(tokens[None]).logits[0].float()
    return nn.functional.cross_entropy(logits, torch.roll(tokens, -1)).item()
