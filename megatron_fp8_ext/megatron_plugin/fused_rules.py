"""Where the fused functions compute what TransformerEngine's modules would, and why elsewhere not.

`why_not` looks at what a module is and is asked once; `not_this_time` at what one call brings.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_fp8_ext.fp8.reference import BLOCK
from megatron_fp8_ext.kernels import support

# cuBLAS wants the contracted dimension of a block-scaled GEMM in multiples of this.
_GEMM_ALIGNMENT = 16
_MEGATRON_DDP = "megatron.core.distributed.distributed_data_parallel"
_OVERLAPS = (
    "ub_overlap_ag_fprop",
    "ub_overlap_rs_fprop",
    "ub_overlap_ag_dgrad",
    "ub_overlap_rs_dgrad",
    "ub_bulk_wgrad",
    "ub_bulk_dgrad",
)


@functools.cache
def machine_gap() -> str | None:
    """Say why no module of this process can be fused, in a clause; None if they can."""
    capability = torch.cuda.get_device_capability()
    if capability[0] != 9:
        return f"compute capability {capability[0]}.{capability[1]}, written for Hopper (9.0)"
    reason = support.gap(torch.device("cuda", torch.cuda.current_device()))
    if reason is not None:
        return reason
    try:
        from transformer_engine.pytorch.module.base import quantize_weight  # noqa: F401
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager
    except ImportError as error:
        return f"this TransformerEngine has another inside ({error}); written for 2.20"
    if not hasattr(FP8GlobalStateManager, "fp8_graph_capturing"):
        return "this TransformerEngine has another inside; written for 2.20"
    return None


@functools.cache
def _state() -> tuple[Any, Any]:
    """TransformerEngine's state of FP8 and of its debug tools."""
    from transformer_engine.debug.pytorch.debug_state import TEDebugState
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    return FP8GlobalStateManager, TEDebugState


def fp8_enabled() -> bool:
    """Whether TransformerEngine computes in FP8 here; asked only where `machine_gap` is None."""
    return bool(_state()[0].is_fp8_enabled())


def why_not(module: Any, kind: str) -> str | None:
    """Say why a module keeps TransformerEngine's path, in a clause; None if it is fused.

    Args:
        module: Megatron's TELayerNormColumnParallelLinear, TERowParallelLinear or MLP.
        kind: `norm + linear`, `linear` or `MLP`.
    """
    gap = machine_gap()
    if gap is not None:
        return gap
    if kind == "norm + linear":
        return _why_not_norm_linear(module)
    if kind == "linear":
        return _why_not_linear(module)
    return _why_not_mlp(module)


def _first(checks: dict[str, Any]) -> str | None:
    return next((reason for reason, found in checks.items() if found), None)


def _why_no_linear_layer(layer: Any) -> str | None:
    """What holds for both kinds of linear layer."""
    config, weight = layer.config, layer.weight
    return _first(
        {
            "per-module quantization": getattr(layer, "te_quant_params", None) is not None,
            "weights in several pieces": list(layer.weight_names) != ["weight"],
            f"weights of {weight.dtype}": weight.dtype != torch.bfloat16,
            "TransformerEngine's communication overlap": any(
                getattr(layer, name, False) for name in _OVERLAPS
            ),
            "delayed weight gradients": layer.wgrad_store is not None
            and layer.wgrad_store.delay_wgrad_compute(),
            "FSDP": layer.fsdp_group is not None
            or layer.is_fsdp2
            or hasattr(weight, "__fsdp_param__"),
            "weights sharded over ranks": getattr(weight, "is_distributed_weight", False),
            "symmetric-memory all-reduce": layer.symmetric_ar_type is not None,
            "activation offloading": config.cpu_offloading
            or getattr(config, "fine_grained_activation_offloading", False),
            # A replayed graph adds the returned gradient; ours is in main_grad already.
            "CUDA graphs": getattr(config, "cuda_graph_impl", "none") not in ("none", None),
            f"sizes {tuple(weight.shape)}, no multiples of {_GEMM_ALIGNMENT}": any(
                size % _GEMM_ALIGNMENT for size in weight.shape
            ),
        }
    )


def _why_not_norm_linear(layer: Any) -> str | None:
    from megatron_fp8_ext.kernels.rmsnorm import MAX_HIDDEN

    return _why_no_linear_layer(layer) or _first(
        {
            f"normalization {layer.normalization}": layer.normalization != "RMSNorm",
            "a norm centred at zero": layer.zero_centered_gamma,
            "the norm's result is returned": layer.return_layernorm_output,
            "not column-parallel": layer.parallel_mode != "column",
            "the bias is returned": layer.te_return_bias,
            f"rows longer than {MAX_HIDDEN}": layer.weight.shape[1] > MAX_HIDDEN,
        }
    )


def _why_not_linear(layer: Any) -> str | None:
    return _why_no_linear_layer(layer) or _first(
        {"not row-parallel": layer.parallel_mode != "row", "a bias": layer.use_bias}
    )


def _why_not_mlp(module: Any) -> str | None:
    config, fc1, fc2 = module.config, module.linear_fc1, module.linear_fc2
    reason = _first(
        {
            f"fc1 is a {type(fc1).__name__}": type(fc1).__name__
            != "TELayerNormColumnParallelLinear",
            f"fc2 is a {type(fc2).__name__}": type(fc2).__name__ != "TERowParallelLinear",
            "the activation is not SwiGLU": not config.gated_linear_unit
            or config.activation_func is not torch.nn.functional.silu,
            "TransformerEngine's activation": config.use_te_activation_func,
            "a clamped or shifted SwiGLU": getattr(config, "activation_func_clamp_value", None)
            is not None
            or getattr(config, "glu_linear_offset", 0.0) != 0.0,
            "Megatron's own FP8 store of the activation": config.activation_func_fp8_input_store,
            "a bias": config.add_bias_linear,
        }
    )
    if reason is not None:
        return reason
    for name, why in (("fc1", _why_not_norm_linear(fc1)), ("fc2", _why_not_linear(fc2))):
        if why is not None:
            return f"{name}: {why}"
    ffn = fc2.weight.shape[1]
    return f"an FFN of {ffn} a rank, no multiple of {BLOCK}" if ffn % BLOCK else None


def not_this_time(module: Any, kind: str, x: Any) -> str | None:
    """Say why this call goes to TransformerEngine, in a clause; None if it need not."""
    manager, debug = _state()
    recipe = manager.get_fp8_recipe()
    # One after the other: this runs for every layer of every forward.
    if not recipe.float8_block_scaling():
        return "another FP8 recipe"
    if getattr(recipe, "backward_override", None) is not None:
        return "a backward in other precision"
    if manager.is_fp8_calibration():
        return "calibration"
    if manager.fp8_graph_capturing():
        return "a graph is captured"
    if debug.debug_enabled:
        return "TransformerEngine's debug tools"
    if torch.is_autocast_enabled():
        return "autocast"
    linear = module.linear_fc1 if kind == "MLP" else module
    return tokens_do_not_fit(x, linear, kind) or (
        watched(module.linear_fc1, module.linear_fc2) if kind == "MLP" else None
    )


def why_no_fused_rope(
    attention: Any, given: dict[str, Any], positional: tuple[Any, ...]
) -> str | None:
    """Say why a call of SelfAttention cannot split and rotate QKV in one pass, or None.

    As `Attention.forward` itself decides (megatron-core 0.17 to 0.19), which asserts that it can where it is
    asked to; and what TransformerEngine's kernel then takes.
    """
    config, rope = attention.config, given.get("rotary_pos_emb")
    freqs = rope[0] if isinstance(rope, tuple) else rope
    head = attention.hidden_size_per_attention_head
    return _first(
        {
            "this Megatron cannot": not hasattr(config, "fused_single_qkv_rope")
            or not hasattr(attention, "q_layernorm"),
            "arguments by position": len(positional) > 1,
            "the fused rotation is switched off": not config.apply_rope_fusion,
            "interleaved rotation": config.rotary_interleaved,
            "no rotation": freqs is None,
            "packed sequences": given.get("packed_seq_params") is not None,
            "inference": given.get("inference_context") is not None
            or given.get("inference_params") is not None
            or config.flash_decode,
            "test mode": config.test_mode,
            # The angles would be another tensor at each capture, and their table is looked at by the host.
            "CUDA graphs": getattr(config, "cuda_graph_impl", "none") not in ("none", None),
            "a gate": getattr(config, "attention_output_gate", False),
            "queries or keys are normalized": not _is_identity(attention.q_layernorm)
            or not _is_identity(attention.k_layernorm),
            "fewer groups than ranks": config.num_query_groups is None
            or config.num_query_groups < attention.world_size,
            "a part of the head is rotated": freqs is not None and freqs.shape[-1] != head,
        }
    )


def _is_identity(layer: Any) -> bool:
    return layer is None or type(layer).__name__ == "IdentityOp"


def tokens_do_not_fit(x: Any, linear: Any, kind: str) -> str | None:
    """Say why this input does not fit, or None."""
    if x.dtype != torch.bfloat16 or type(x) is not torch.Tensor:
        return f"an input of {x.dtype} in a {type(x).__name__}"
    tokens = x.numel() // x.shape[-1]
    multiple = _GEMM_ALIGNMENT
    if linear.tp_size > 1 and linear.sequence_parallel:
        # Of a rank, as the casts of the ranks' tokens are put together.
        tokens, multiple = tokens // (linear.tp_size if kind == "linear" else 1), BLOCK
    return f"{tokens} tokens on a rank, no multiple of {multiple}" if tokens % multiple else None


def watched(*layers: Any) -> str | None:
    """Say whether somebody watches a layer inside the MLP: its hooks need its input and output."""
    for layer in layers:
        if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
            return "hooks inside the MLP"
        for hook in layer._forward_pre_hooks.values():
            if getattr(hook, "__module__", None) != _MEGATRON_DDP:
                return "hooks inside the MLP"
    return None
