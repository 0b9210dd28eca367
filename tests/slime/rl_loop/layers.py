"""The layers of the model, for slime's `--spec`: slime v0.3 calls Megatron's specs with an argument of other versions."""

from __future__ import annotations

from typing import Any


def spec(args: Any, config: Any, vp_stage: int | None = None) -> Any:
    """Return Megatron's own layer spec, TransformerEngine's or the local one."""
    from megatron.core.models.gpt import gpt_layer_specs as specs

    if args.transformer_impl == "transformer_engine":
        return specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=args.qk_layernorm)
    return specs.get_gpt_layer_local_spec(
        qk_layernorm=args.qk_layernorm, normalization=args.normalization
    )
