"""Make each layer compute in the precision that was asked for, or stop the run.

Megatron enters `get_fp8_context` around exactly the layers that are FP8 (so the embedding, the LM head
and `--first-last-layers-bf16` are settled there). Without TransformerEngine that context is empty and the
run silently stays in BF16; here it becomes the emulation. With TransformerEngine the recipe object is
pinned to the scale format of the run.
"""

from __future__ import annotations

import atexit
import contextlib
from types import ModuleType
from typing import Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import compat, run


def fp8_context(module: ModuleType) -> None:
    """Replace `get_fp8_context` and `get_fp8_recipe` of `megatron.core.fp8_utils`."""
    native_context, native_recipe = module.get_fp8_context, module.get_fp8_recipe

    def get_fp8_context(config: Any, layer_no: int = -1, is_init: bool = False) -> Any:
        recipe = run.current.recipe
        if not run.current.emulated or recipe is None or not config.fp8:
            return native_context(config, layer_no, is_init)
        if is_init or compat.layer_stays_bf16(config, layer_no):
            return contextlib.nullcontext()
        from megatron_fp8_ext.fp8 import casts, emulation

        return emulation.autocast(recipe.scale_format, casts.of_recipe(recipe))

    def get_fp8_recipe(config: Any) -> Any:
        built = native_recipe(config)
        recipe = run.current.recipe
        if recipe is not None and recipe.is_fp8 and built is not None:
            pin_scale_format(built, recipe.scale_format == "power_of_two")
        return built

    module.get_fp8_context = get_fp8_context  # type: ignore[attr-defined]
    module.get_fp8_recipe = get_fp8_recipe  # type: ignore[attr-defined]


def pin_scale_format(te_recipe: Any, power_of_two: bool) -> None:
    """Set the scale format on a TransformerEngine `Float8BlockScaling`, whatever its import saw.

    TE reads the environment once, when its recipe class is defined; somebody may have imported it
    before us. The three fields are class attributes there, so they are set on the instance.

    Raises:
        UserError: the object is not a block-scaling recipe, or this TE names the fields otherwise.
    """
    for name in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        params = getattr(te_recipe, name, None)
        if params is None or not hasattr(params, "power_2_scale"):
            raise run.stop(
                UserError(
                    f"{type(te_recipe).__name__} of this TransformerEngine has no "
                    f"{name}.power_2_scale: its scale format cannot be pinned; use TE 2.4 to 2.20"
                )
            )
        if params.power_2_scale != power_of_two:
            import dataclasses

            setattr(te_recipe, name, dataclasses.replace(params, power_2_scale=power_of_two))


def emulated_linear(module: ModuleType) -> None:
    """Replace the one function both parallel linear layers of Megatron's local spec compute with."""
    native = module.linear_with_grad_accumulation_and_async_allreduce
    native_frozen = module.linear_with_frozen_weight

    def linear(
        input: Any,
        weight: Any,
        bias: Any,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        from megatron_fp8_ext.fp8 import emulation

        operands = emulation.active_casts()
        if operands is None:
            return native(
                input,
                weight,
                bias,
                gradient_accumulation_fusion,
                allreduce_dgrad,
                sequence_parallel,
                *args,
                **kwargs,
            )
        group = kwargs.get("tp_group")
        if group is None and (allreduce_dgrad or sequence_parallel):
            from megatron.core import parallel_state

            group = parallel_state.get_tensor_model_parallel_group()
        return emulation.EmulatedLinear.apply(
            input,
            weight,
            bias,
            allreduce_dgrad,
            sequence_parallel,
            group,
            operands.scale_format,
            operands,
        )

    def frozen(input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron_fp8_ext.fp8 import emulation

        if emulation.active_scale_format() is not None:
            raise run.stop(
                UserError("emulated FP8 does not train around frozen weights; unfreeze them")
            )
        return native_frozen(input, weight, *args, **kwargs)

    linear.warned = True  # type: ignore[attr-defined]  # Megatron keeps its once-only flag here
    module.linear_with_grad_accumulation_and_async_allreduce = linear  # type: ignore[attr-defined]
    module.linear_with_frozen_weight = frozen  # type: ignore[attr-defined]
    atexit.register(_report_quantizations)


def _report_quantizations() -> None:
    """At the end of an emulated run, say how often each operand was cast."""
    if not run.current.emulated:
        return
    from megatron_fp8_ext.fp8.emulation import quantizations

    counts = ", ".join(f"{name} {count}" for name, count in sorted(quantizations.items()))
    run.say(f"emulated casts on rank 0: {counts or 'NONE'}")
