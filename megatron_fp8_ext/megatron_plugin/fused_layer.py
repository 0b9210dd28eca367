"""The fused path in the layers that Megatron builds from TransformerEngine's modules.

The modules stay what they are: parameters, their names, initialization, checkpoints, tensor-parallel
attributes and the optimizer never see a difference. What changes is how `forward` of three classes computes
where `why_not` finds no reason against it; a module with a reason keeps TransformerEngine's path.

    TELayerNormColumnParallelLinear  norm-QKV (and fc1, where its MLP is not fused)
    TERowParallelLinear              the attention's projection
    MLP                              norm, fc1, SwiGLU and fc2 in one function
    SelfAttention                    QKV is split and rotated in one pass (Megatron can, no flag of it reaches
                                     that), by our kernel where it fits
    TransformerLayer                 the residual is added by the last GEMM (`fused.residual`)
"""

from __future__ import annotations

import functools
from collections import Counter
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from megatron_fp8_ext.megatron_plugin import fused_rules, run

# Why a module is not fused, or None; and how a fused one computes. Beside the modules, not in them: they
# are copied and pickled.
_verdicts: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()
_setups: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

# Modules of this process by kind and by what became of them, for the line on rank 0.
_counts: Counter[tuple[str, str]] = Counter()


def te_linears(module: ModuleType) -> None:
    """Patch the two linear layers of `megatron.core.extensions.transformer_engine`."""
    # Without TransformerEngine, as in the driver of a Ray job, the classes stand on mocks.
    there = getattr(module, "HAVE_TE", True)
    if not there or not hasattr(module, "TELayerNormColumnParallelLinear"):
        return
    column, linear = module.TELayerNormColumnParallelLinear, module.TELinear
    native_column, native_linear = column.forward, linear.forward

    @functools.wraps(native_column)
    def column_forward(self: Any, x: Any) -> Any:
        if not _fused(self, "norm + linear", x):
            return native_column(self, x)
        return _norm_linear(self, x), None

    @functools.wraps(native_linear)
    def linear_forward(self: Any, x: Any) -> Any:
        # The class above it serves duplicated and column-parallel layers as well.
        if not isinstance(self, module.TERowParallelLinear) or not _fused(self, "linear", x):
            return native_linear(self, x)
        return _linear(self, x), None

    column.forward, linear.forward = column_forward, linear_forward


def mlp(module: ModuleType) -> None:
    """Patch `MLP` of `megatron.core.transformer.mlp`."""
    native = module.MLP.forward

    @functools.wraps(native)
    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        weights = args[0] if args else kwargs.get("per_token_scale")
        if (
            weights is not None
            or type(self) is not module.MLP
            or not _fused(self, "MLP", hidden_states)
        ):
            return native(self, hidden_states, *args, **kwargs)
        return _mlp(self, hidden_states), None

    module.MLP.forward = forward


def attention(module: ModuleType) -> None:
    """Patch `SelfAttention` of `megatron.core.transformer.attention`."""
    if not hasattr(module, "apply_fused_qkv_rotary_pos_emb"):
        return  # Megatron without TransformerEngine
    cls = module.SelfAttention
    native, native_rotate = cls.forward, module.apply_fused_qkv_rotary_pos_emb

    @functools.wraps(native_rotate)
    def rotate(
        qkv: Any, q_angles: Any, k_angles: Any, split: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if run.current.fused and not args and not kwargs and q_angles is k_angles:
            from megatron_fp8_ext.kernels import rope

            if rope.takes(qkv, q_angles, split):
                return rope.split_and_rotate(qkv, q_angles)
        return native_rotate(qkv, q_angles, k_angles, split, *args, **kwargs)

    module.apply_fused_qkv_rotary_pos_emb = rotate  # type: ignore[attr-defined]

    @functools.wraps(native)
    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.config
        if (
            type(self) is not cls
            or not run.current.fused
            or fused_rules.machine_gap() is not None
            or fused_rules.why_no_fused_rope(self, kwargs, args) is not None
        ):
            return native(self, hidden_states, *args, **kwargs)
        # The configuration is the whole model's, and other calls of it may not be like this one.
        asked, config.fused_single_qkv_rope = config.fused_single_qkv_rope, True
        try:
            return native(self, hidden_states, *args, **kwargs)
        finally:
            config.fused_single_qkv_rope = asked

    cls.forward = forward


def residual_stream(module: ModuleType) -> None:
    """Patch `TransformerLayer` of `megatron.core.transformer.transformer_layer`.

    Around attention and MLP it says which residual is added to their result next: their last GEMM can do it.
    """
    cls = module.TransformerLayer

    def around(native: Any, last: Any) -> Any:
        @functools.wraps(native)
        def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            if type(self) is not cls or not run.current.fused or not _adds_residual(self):
                return native(self, hidden_states, *args, **kwargs)
            from megatron_fp8_ext.fused import residual as stream

            with stream.follows(last(self), hidden_states):
                return native(self, hidden_states, *args, **kwargs)

        return forward

    cls._forward_attention = around(
        cls._forward_attention, lambda layer: getattr(layer.self_attention, "linear_proj", None)
    )
    cls._forward_mlp = around(cls._forward_mlp, lambda layer: layer.mlp)


def _adds_residual(layer: Any) -> bool:
    """Whether the sums of a layer are plain ones with its own input (`residual_add`)."""
    import torch

    config = layer.config
    return (
        torch.is_grad_enabled()
        and layer.training
        and bool(config.bias_dropout_fusion)
        and layer.hidden_dropout == 0.0
        and not config.fp32_residual_connection
        and not getattr(layer, "recompute_mlp", False)
        and type(layer.input_layernorm).__name__ == "IdentityOp"
        and type(layer.pre_mlp_layernorm).__name__ == "IdentityOp"
        and type(layer.cross_attention).__name__ == "IdentityOp"
    )


def residual_add(module: ModuleType) -> None:
    """Patch `get_bias_dropout_add` of `megatron.core.fusions.fused_bias_dropout`.

    Without a bias and without dropout what is left is one sum, the same bits; compiled by torch it costs the
    host more than the GPU. Its gradient is added in the fused norm's backward (`fused.residual`).
    """
    native = module.get_bias_dropout_add

    @functools.wraps(native)
    def get_bias_dropout_add(training: bool, fused: bool) -> Any:
        chosen = native(training, fused)
        if not (run.current.fused and fused):
            return chosen

        def add(x_with_bias: Any, residual: Any, prob: float) -> Any:
            from megatron_fp8_ext.fused import residual as stream

            x, bias = x_with_bias
            plain = bias is None and x.dtype == residual.dtype and (prob == 0.0 or not training)
            if not plain or not x.requires_grad:
                # Megatron's writes into its input where nothing is trained.
                return chosen(x_with_bias, residual, prob)
            return stream.add(x, residual)

        return add

    module.get_bias_dropout_add = get_bias_dropout_add  # type: ignore[attr-defined]


def _fused(module: Any, kind: str, x: Any) -> bool:
    """Whether this call goes through the fused function."""
    if not run.current.fused:
        return False
    if fused_rules.machine_gap() is None and not fused_rules.fp8_enabled():
        return False  # a layer that stays in BF16
    if module not in _verdicts:
        verdict = _verdicts[module] = fused_rules.why_not(module, kind)
        _counts[(kind, verdict or "fused")] += 1
    return _verdicts[module] is None and fused_rules.not_this_time(module, kind, x) is None


@functools.cache
def _gemm() -> Any:
    from megatron_fp8_ext.megatron_plugin.te_gemm import TEGemm

    return TEGemm()


def _setup(module: Any) -> Any:
    """How this module's linear layers compute; made once."""
    setup = _setups.get(module)
    if setup is None:
        from megatron_fp8_ext.fused.linear import Setup
        from megatron_fp8_ext.fused.parallel import Parallel

        parallel = None
        if module.tp_size > 1:
            parallel = Parallel(module.tp_group, bool(module.sequence_parallel))
        assert run.current.recipe is not None
        setup = _setups[module] = Setup(_gemm(), run.current.recipe.scale_format, parallel)
    return setup


class _Prepared:
    """TransformerEngine's own bookkeeping around a forward, and the layer's weight."""

    def __init__(self, module: Any, x: Any) -> None:
        self.module = module
        self.x = module.prepare_forward(x)

    def __enter__(self) -> Any:
        from megatron_fp8_ext.fused.linear import Linear
        from megatron_fp8_ext.megatron_plugin.te_gemm import weight_operand

        module = self.module
        first = None if module.disable_parameter_transpose_cache else module.is_first_microbatch
        # As TransformerEngine with fused accumulation: the step's first gradient overwrites.
        linear = Linear(module.weight, weight_operand(module, first), accumulate=first is not True)
        module.is_first_microbatch = False
        return linear

    def __exit__(self, *error: object) -> None:
        self.module.end_forward()


def _norm_linear(module: Any, x: Any) -> Any:
    from megatron_fp8_ext.fused.linear import norm_linear

    prepared = _Prepared(module, x)
    with prepared as linear:
        bias = module.bias if module.use_bias else None
        return norm_linear(
            prepared.x, module.layer_norm_weight, module.eps, linear, bias, _setup(module)
        )


def _linear(module: Any, x: Any) -> Any:
    from megatron_fp8_ext.fused import residual as stream
    from megatron_fp8_ext.fused.linear import cast_linear

    setup, prepared = _setup(module), _Prepared(module, x)
    past = stream.expected_by(module) if setup.parallel is None else None
    with prepared as linear:
        y = cast_linear(prepared.x, linear, setup, past)
    return y if past is None else stream.done(y)


def _mlp(module: Any, x: Any) -> Any:
    from megatron_fp8_ext.fused import residual as stream
    from megatron_fp8_ext.fused.mlp import Block
    from megatron_fp8_ext.fused.mlp import mlp as fused

    fc1, fc2 = module.linear_fc1, module.linear_fc2
    for layer in (fc1, fc2):
        # Megatron's overlapped parameter gather waits for a layer's weights in such a hook.
        for hook in layer._forward_pre_hooks.values():
            hook(layer, ())
    setup, outer = _setup(fc1), _Prepared(fc1, x)
    # Only what is summed with the MLP's own input, not with some of its rows.
    add = setup.parallel is None and stream.expected_by(module) is x
    with outer as first, _Prepared(fc2, outer.x) as second:
        block = Block(first, second, fc1.eps, setup, run.current.stash)
        y = fused(outer.x, fc1.layer_norm_weight, block, add)
    return stream.done(y) if add else y


def summary() -> str | None:
    """One line: how many modules are fused, and why others are not; None before any forward."""
    if not _counts:
        return None
    parts = []
    for kind in ("norm + linear", "linear", "MLP"):
        found = {why: count for (name, why), count in _counts.items() if name == kind}
        total = sum(found.values())
        if not total:
            continue
        part = f"{kind} {found.pop('fused', 0)} of {total}"
        if found:
            part += f" ({'; '.join(f'{count}: {why}' for why, count in sorted(found.items()))})"
        parts.append(part)
    stash = ", fc1's output kept in 8 bits" if run.current.stash else ""
    gap = _cuda_gap()
    triton = "" if gap is None else f"; Triton's kernels instead of CUDA's: {gap}"
    return f"fused layers: {', '.join(parts)}{stash}{triton}"


def _cuda_gap() -> str | None:
    """Why the CUDA kernels are not used on this GPU, in a clause."""
    import torch

    if not torch.cuda.is_available():
        return None
    from megatron_fp8_ext.kernels import hopper

    return hopper.reason(torch.cuda.current_device())


def say_after_first_step(module: ModuleType) -> None:
    """Wrap `train_step` of `megatron.training.training`: after the first, say what was fused."""
    native = module.train_step
    said = False

    @functools.wraps(native)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal said
        result = native(*args, **kwargs)
        if not said:
            said = True
            line = summary()
            if line is not None:
                run.say(line)
        return result

    module.train_step = train_step  # type: ignore[attr-defined]
