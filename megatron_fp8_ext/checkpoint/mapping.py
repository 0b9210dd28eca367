"""The table between Megatron's names and Hugging Face's, and how one tensor becomes several.

To add a family whose layers are of this kind: name it in `architecture.FAMILIES` and, where it has more
tensors, add rows here (Qwen3's q_norm and k_norm are such). Shapes are checked on both sides, and
a name without a row is an error, so a wrong row cannot convert anything silently.

Names of dimensions: L layers, H hidden, F FFN, V vocabulary, G query groups, R = query heads of a group,
D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fp8_ext.checkpoint.architecture import Architecture
from megatron_fp8_ext.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How a Megatron tensor and its Hugging Face tensors correspond.

    Attributes:
        split: Megatron tensor -> Hugging Face tensors.
        join: the inverse.
        shapes: shapes of the Hugging Face tensors; their `join` has the Megatron shape.
    """

    split: Callable[[Tensor, Architecture], list[Tensor]]
    join: Callable[[Sequence[Tensor], Architecture], Tensor]
    shapes: Callable[[Architecture], list[Shape]]


def split_qkv(fused: Tensor, a: Architecture) -> list[Tensor]:
    """`[G * (R + 2) * D, ...]`, interleaved by group -> q `[G * R * D, ...]`, k, v `[G * D, ...]`."""
    per_group = a.num_attention_heads // a.num_query_groups
    rest = fused.shape[1:]
    grouped = fused.reshape(a.num_query_groups, per_group + 2, a.kv_channels, *rest)
    parts = grouped.split([per_group, 1, 1], dim=1)
    return [part.reshape(-1, *rest) for part in parts]


def join_qkv(parts: Sequence[Tensor], a: Architecture) -> Tensor:
    """The inverse of `split_qkv`."""
    rest = parts[0].shape[1:]
    grouped = [part.reshape(a.num_query_groups, -1, a.kv_channels, *rest) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def _copy(shape: Callable[[Architecture], Shape]) -> Layout:
    return Layout(lambda t, a: [t], lambda parts, a: parts[0], lambda a: [shape(a)])


def _qkv(*rest: str) -> Layout:
    def shapes(a: Architecture) -> list[Shape]:
        heads, groups = a.num_attention_heads, a.num_query_groups
        tail = (a.hidden_size,) if rest else ()
        return [(n * a.kv_channels, *tail) for n in (heads, groups, groups)]

    return Layout(split_qkv, join_qkv, shapes)


NORM = _copy(lambda a: (a.hidden_size,))
HEAD_NORM = _copy(lambda a: (a.kv_channels,))
VOCABULARY = _copy(lambda a: (a.vocab_size, a.hidden_size))
ATTENTION_OUT = _copy(lambda a: (a.hidden_size, a.num_attention_heads * a.kv_channels))
FFN_OUT = _copy(lambda a: (a.hidden_size, a.ffn_hidden_size))
QKV_WEIGHT, QKV_BIAS = _qkv("hidden"), _qkv()
# `[2F, H]`, gate rows first. So it is in the whole tensor; a tensor-parallel shard holds its own halves.
GATE_UP = Layout(
    lambda t, a: list(t.chunk(2, dim=0)),
    lambda parts, a: torch.cat(list(parts), dim=0),
    lambda a: [(a.ffn_hidden_size, a.hidden_size)] * 2,
)


@dataclass(frozen=True)
class Row:
    """One line of the table. `{}` is the layer's number; Megatron stacks layers instead of numbering."""

    megatron: str
    hf: tuple[str, ...]
    layout: Layout
    when: Callable[[Architecture], bool] = lambda a: True
    fp8: bool = False

    @property
    def in_layers(self) -> bool:
        """Whether every layer has one."""
        return self.megatron.startswith(_LAYERS)


_LAYERS = "decoder.layers."
_L = "model.layers.{}."
TABLE: tuple[Row, ...] = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), VOCABULARY),
    Row(f"{_LAYERS}self_attention.linear_qkv.layer_norm_weight",
        (f"{_L}input_layernorm.weight",), NORM),
    Row(f"{_LAYERS}self_attention.linear_qkv.weight",
        tuple(f"{_L}self_attn.{x}_proj.weight" for x in "qkv"), QKV_WEIGHT, fp8=True),
    Row(f"{_LAYERS}self_attention.linear_qkv.bias",
        tuple(f"{_L}self_attn.{x}_proj.bias" for x in "qkv"), QKV_BIAS, lambda a: a.qkv_bias),
    Row(f"{_LAYERS}self_attention.q_layernorm.weight",
        (f"{_L}self_attn.q_norm.weight",), HEAD_NORM, lambda a: a.qk_norm),
    Row(f"{_LAYERS}self_attention.k_layernorm.weight",
        (f"{_L}self_attn.k_norm.weight",), HEAD_NORM, lambda a: a.qk_norm),
    Row(f"{_LAYERS}self_attention.linear_proj.weight",
        (f"{_L}self_attn.o_proj.weight",), ATTENTION_OUT, fp8=True),
    Row(f"{_LAYERS}mlp.linear_fc1.layer_norm_weight",
        (f"{_L}post_attention_layernorm.weight",), NORM),
    Row(f"{_LAYERS}mlp.linear_fc1.weight",
        (f"{_L}mlp.gate_proj.weight", f"{_L}mlp.up_proj.weight"), GATE_UP, fp8=True),
    Row(f"{_LAYERS}mlp.linear_fc2.weight", (f"{_L}mlp.down_proj.weight",), FFN_OUT, fp8=True),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), NORM),
    Row("output_layer.weight", ("lm_head.weight",), VOCABULARY, lambda a: not a.tied),
)  # fmt: skip


def extra_states(a: Architecture) -> list[str]:
    """Return the modules of a layer beside which TransformerEngine's layers keep an `_extra_state`."""
    norms = ("q_layernorm", "k_layernorm") if a.qk_norm else ()
    attention = ("linear_qkv", "core_attention", "linear_proj", *norms)
    found = [f"{_LAYERS}self_attention.{module}" for module in attention]
    return [*found, f"{_LAYERS}mlp.linear_fc1", f"{_LAYERS}mlp.linear_fc2"]


@dataclass(frozen=True)
class Unit:
    """One Megatron tensor (of one layer) and its Hugging Face tensors.

    Attributes:
        megatron: name of the stacked tensor.
        layer: its layer; None outside of the layers.
        hf: names of the Hugging Face tensors.
        hf_shapes: their shapes.
        row: the line of the table.
    """

    megatron: str
    layer: int | None
    hf: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    row: Row

    @property
    def megatron_shape(self) -> Shape:
        """Shape of the Megatron tensor without a layer axis and without vocabulary padding."""
        first = self.hf_shapes[0]
        return (sum(shape[0] for shape in self.hf_shapes), *first[1:])


def units(a: Architecture) -> list[Unit]:
    """Return everything a model consists of, in the order of its forward pass."""
    rows = [row for row in TABLE if row.when(a)]
    before = [row for row in rows if not row.in_layers and row.megatron.startswith("embedding")]
    after = [row for row in rows if not row.in_layers and row not in before]
    layers = [row for row in rows if row.in_layers]

    def unit(row: Row, layer: int | None) -> Unit:
        names = tuple(name.format(layer) for name in row.hf)
        return Unit(row.megatron, layer, names, tuple(row.layout.shapes(a)), row)

    found = [unit(row, None) for row in before]
    found += [unit(row, layer) for layer in range(a.num_layers) for row in layers]
    return found + [unit(row, None) for row in after]


def fp8_weights(a: Architecture) -> list[str]:
    """Return the Hugging Face names of the weights that training keeps or casts in FP8."""
    return [name for unit in units(a) if unit.row.fp8 for name in unit.hf]


def check_shape(name: str, found: Shape, expected: Shape, where: str) -> None:
    """Compare a stored shape with the one config.json says.

    Raises:
        UserError: they differ.
    """
    if found != expected:
        raise UserError(
            f"{where}: {name} has shape {list(found)}, config.json says {list(expected)}; "
            "give the configuration this checkpoint was made with"
        )
