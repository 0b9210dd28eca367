"""FP32 main parameters out of the distributed optimizer's own buffers (`dp_reshardable`).

That is its default layout from Megatron 0.17 on: for each model-parallel rank, each dtype and each bucket one
flat tensor, and no parameter's name. What stands where follows from Megatron's rule (core/optimizer/
distrib_optimizer.py, `_compute_per_buffer_param_layout`): the parameters of a rank in reverse order, each
from a multiple of 64 on. The rule is applied to the architecture and held to the index: every bucket
must be filled to its last value, and every parameter must begin and end where a stored piece does.
`weights.MegatronWeights` then holds every value to the weights beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_fp8_ext.checkpoint import mapping
from megatron_fp8_ext.checkpoint.architecture import Architecture
from megatron_fp8_ext.checkpoint.mapping import Shape, Unit
from megatron_fp8_ext.checkpoint.torch_dist import TorchDist

_BUCKET = re.compile(
    r"(?:chained_0\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)"
    r"\.dtype_\(torch\.(\w+), torch\.\w+\)\.bucket_idx_(\d+)\.param"
)
_ALIGNMENT = 64
_LAYER = "decoder.layers."
_QKV, _FC1 = f"{_LAYER}self_attention.linear_qkv", f"{_LAYER}mlp.linear_fc1"
_ATTENTION = (
    f"{_LAYER}self_attention.linear_proj.weight",
    f"{_QKV}.layer_norm_weight",
    f"{_QKV}.weight",
    f"{_QKV}.bias",
    f"{_LAYER}self_attention.q_layernorm.weight",
    f"{_LAYER}self_attention.k_layernorm.weight",
)
_MLP = (f"{_FC1}.layer_norm_weight", f"{_FC1}.weight", f"{_LAYER}mlp.linear_fc2.weight")
# A layer's parameters in the order of its modules: TransformerEngine's layers hold the norm before
# them; Megatron's local ones have it as a module of its own, which comes before attention.
_ORDERS = (
    (*_ATTENTION, *_MLP),
    (_ATTENTION[1], _ATTENTION[0], *_ATTENTION[2:], *_MLP),
)
# Which axis tensor parallelism cuts; norms are whole on every rank.
_SPLIT_AXIS = {
    "embedding.word_embeddings.weight": 0,
    "output_layer.weight": 0,
    f"{_QKV}.weight": 0,
    f"{_QKV}.bias": 0,
    f"{_LAYER}self_attention.linear_proj.weight": 1,
    f"{_FC1}.weight": 0,
    f"{_LAYER}mlp.linear_fc2.weight": 1,
}
Key = tuple[str, int | None]


class DoesNotFit(Exception):
    """The buffers are not what Megatron's rule makes of this architecture; the reason is the text."""


@dataclass(frozen=True)
class Slot:
    """Where one rank's part of a parameter lies: name of the bucket, first value, shape of the part."""

    bucket: str
    start: int
    shape: Shape


class BufferedMainParams:
    """The main parameters of a checkpoint, by Megatron name and layer.

    Raises:
        DoesNotFit: no such buffers, or they do not fit the architecture.
    """

    def __init__(
        self, checkpoint: TorchDist, arch: Architecture, arguments: Mapping[str, Any]
    ) -> None:
        self._checkpoint = checkpoint
        buffers = _buffers(checkpoint)
        if not buffers:
            raise DoesNotFit("the checkpoint has none")
        self._tensor_parallel, stages = _parallel_sizes(arch, arguments)
        if set(buffers) != set(range(self._tensor_parallel * stages)):
            raise DoesNotFit(f"they are of {len(buffers)} ranks")
        self._shapes = {
            (unit.megatron, unit.layer): _stored_shape(checkpoint, unit)
            for unit in mapping.units(arch)
        }
        failure = DoesNotFit("")
        for order in _ORDERS:
            try:
                self._slots = self._place(arch, buffers, stages, order)
                return
            except DoesNotFit as error:
                failure = failure if str(failure) else error
        raise failure

    def read(self, unit: Unit) -> list[Tensor]:
        """Return a parameter's parts, one a tensor-parallel rank (one in all for a norm), as BF16."""
        parts = []
        for slot in self._slots[unit.megatron, unit.layer]:
            stop = slot.start + math.prod(slot.shape)
            flat = self._checkpoint.read_range(slot.bucket, slot.start, stop, torch.bfloat16)
            parts.append(flat.reshape(slot.shape))
        return parts if unit.megatron in _SPLIT_AXIS else parts[:1]

    def cut(self, unit: Unit, value: Tensor) -> list[Tensor]:
        """Return the parts of a parameter in its global shape, vocabulary padding included."""
        if unit.megatron not in _SPLIT_AXIS:
            return [value]
        if unit.row.layout is mapping.GATE_UP:  # each rank has its own gate rows, then its up rows
            halves = (half.chunk(self._tensor_parallel) for half in value.chunk(2))
            return [torch.cat(pair) for pair in zip(*halves, strict=True)]
        return list(value.chunk(self._tensor_parallel, dim=_SPLIT_AXIS[unit.megatron]))

    def join(self, unit: Unit, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `cut`."""
        if len(parts) == 1:
            return parts[0]
        if unit.row.layout is mapping.GATE_UP:
            halves = zip(*(part.chunk(2) for part in parts), strict=True)
            return torch.cat([part for half in halves for part in half])
        return torch.cat(list(parts), dim=_SPLIT_AXIS[unit.megatron])

    def _place(
        self,
        arch: Architecture,
        buffers: dict[int, dict[int, tuple[str, list[str]]]],
        stages: int,
        order: Sequence[str],
    ) -> dict[Key, list[Slot]]:
        slots: dict[Key, list[Slot]] = {}
        fp8 = {unit.megatron for unit in mapping.units(arch) if unit.row.fp8}
        for stage in range(stages):
            keys = _stage_parameters(arch, set(self._shapes), stage, stages, order)
            for rank in range(self._tensor_parallel):
                found = buffers[stage * self._tensor_parallel + rank]
                gathered = any(dtype == "uint8" for dtype, _ in found.values())
                for dtype, buckets in found.values():
                    chosen = [
                        k for k in keys if not gathered or (k[0] in fp8) == (dtype == "uint8")
                    ]
                    for key, slot in self._fill(chosen, buckets):
                        # The last stage's copy of a tied embedding is the same parameter once more.
                        if len(slots.setdefault(key, [])) == rank:
                            slots[key].append(slot)
        if any(len(slots.get(key, ())) != self._tensor_parallel for key in self._shapes):
            raise DoesNotFit("a parameter is in none of them")
        return slots

    def _fill(self, keys: list[Key], buckets: list[str]) -> list[tuple[Key, Slot]]:
        """Lay parameters into a buffer's buckets from the last to the first, by Megatron's rule."""
        placed: list[tuple[Key, Slot]] = []
        left = iter(buckets)
        bucket, size, edges, at = "", 0, {0}, 0
        for key in reversed(keys):
            start = -(-at // _ALIGNMENT) * _ALIGNMENT
            if at == size or start == size:
                bucket = next(left, "")
                if not bucket:
                    raise DoesNotFit(f"{key[0]} has no room in them")
                stored = self._checkpoint.tensors[bucket]
                size, start = stored.shape[0], 0
                edges = {
                    n for p in stored.pieces for n in (p.offsets[0], p.offsets[0] + p.sizes[0])
                }
            shape = self._part_shape(key)
            at = start + math.prod(shape)
            if at > size or start not in edges or at not in edges:
                raise DoesNotFit(f"{key[0]} is not at {start} to {at} of {bucket}")
            placed.append((key, Slot(bucket, start, shape)))
        if next(left, "") or -(-at // _ALIGNMENT) * _ALIGNMENT < size:
            raise DoesNotFit("they hold more than the model's parameters")
        return placed

    def _part_shape(self, key: Key) -> Shape:
        shape, axis = list(self._shapes[key]), _SPLIT_AXIS.get(key[0])
        if axis is not None:
            if shape[axis] % self._tensor_parallel:
                raise DoesNotFit(f"{self._tensor_parallel} ranks do not divide {key[0]}")
            shape[axis] //= self._tensor_parallel
        return tuple(shape)


def _buffers(checkpoint: TorchDist) -> dict[int, dict[int, tuple[str, list[str]]]]:
    """Return, by model-parallel rank and buffer, its parameters' dtype and its buckets in order."""
    found: dict[int, dict[int, tuple[str, dict[int, str]]]] = {}
    for name in checkpoint.tensors:
        match = _BUCKET.fullmatch(name)
        if match:
            group, buffer, bucket = (int(match.group(n)) for n in (1, 2, 4))
            of_group = found.setdefault(group, {})
            of_group.setdefault(buffer, (match.group(3), {}))[1][bucket] = name
    return {
        group: {
            n: (dtype, [buckets[b] for b in sorted(buckets)])
            for n, (dtype, buckets) in of_group.items()
        }
        for group, of_group in found.items()
    }


def _parallel_sizes(arch: Architecture, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Return (tensor, pipeline) parallelism of the run that saved."""
    if not arguments:
        raise DoesNotFit("the checkpoint stores no arguments, so its parallel sizes are unknown")
    for name in (
        "virtual_pipeline_model_parallel_size",
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "pipeline_model_parallel_layout",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
    ):
        if arguments.get(name):
            raise DoesNotFit(f"the run that saved had {name}={arguments[name]}")
    tensor = int(arguments.get("tensor_model_parallel_size") or 1)
    stages = int(arguments.get("pipeline_model_parallel_size") or 1)
    if arch.num_layers % stages:
        raise DoesNotFit(f"{stages} pipeline stages do not divide {arch.num_layers} layers")
    return tensor, stages


def _stored_shape(checkpoint: TorchDist, unit: Unit) -> Shape:
    """A parameter's global shape as the checkpoint has it: with the vocabulary's padding."""
    shape = unit.megatron_shape
    if unit.row.layout is mapping.VOCABULARY:
        return (checkpoint.tensors[unit.megatron].shape[0], *shape[1:])
    return shape


def _stage_parameters(
    arch: Architecture, known: set[Key], stage: int, stages: int, order: Sequence[str]
) -> list[Key]:
    """Return the parameters of a pipeline stage in the order of its modules."""
    each = arch.num_layers // stages
    embedding: Key = ("embedding.word_embeddings.weight", None)
    keys: list[Key] = [embedding] if stage == 0 else []
    for layer in range(stage * each, (stage + 1) * each):
        keys += [(name, layer) for name in order if (name, layer) in known]
    if stage == stages - 1:
        keys.append(("decoder.final_layernorm.weight", None))
        if not arch.tied:
            keys.append(("output_layer.weight", None))
        elif stages > 1:
            keys.append(embedding)
    return keys
