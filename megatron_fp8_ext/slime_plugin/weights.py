"""What slime pushes to the rollout servers: training's own codes and scales.

slime's quantizer casts with FP32 scales whatever training used, by a rounding of its own, and never reads the
list of modules the servers keep in BF16. `install` replaces it, at both commits, by `fp8/reference.py` in the
recipe's scale format. The parameters come here gathered and split into Hugging Face's matrices, in BF16
or, under `--fp8-param-gather`, dequantized from FP8: casting those again gives the same numbers
(tests/slime).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.fp8 import reference
from megatron_fp8_ext.recipe import ScaleFormat

if TYPE_CHECKING:
    from torch import Tensor

    Named = list[tuple[str, Tensor]]

_CONVERT = "slime.backends.megatron_utils.megatron_to_hf"
_LAYER = re.compile(r"(?:module\.)*(?:decoder|mtp)\.layers\.(\d+)\.(.+)")
# Linear layers inside Megatron's FP8 context: dense, expert and latent attention.
_LINEAR = re.compile(
    r"(?:transformer_layer\.)?(?:self_attention\.linear_\w+|mlp\.(?:shared_experts\.|experts\.)?linear_fc[12])"
    r"\.weight\d*"
)
# What slime HEAD also quantizes, for models this plugin was never run with.
_UNTESTED = re.compile(r".*(?:linear_attn|\.wq_b|\.wk)\b.*\.weight")


def install(scale_format: ScaleFormat) -> list[str]:
    """Replace `quantize_params` where slime looks it up; returns the names of the replaced symbols.

    Raises:
        UserError: this slime has no such function.
    """
    module = importlib.import_module(_CONVERT)
    native = getattr(module, "quantize_params", None)
    if native is None:
        raise UserError(
            f"this slime has no {_CONVERT}.quantize_params: the weight push cannot be held to the "
            "recipe; use slime 8359c9a or v0.3.x"
        )

    def quantize_params(
        args: Any,
        megatron_name: str,
        converted_named_params: Named,
        quantization_config: Mapping[str, Any] | None,
        transform_ue8m0: bool = True,
    ) -> Named:
        if not quantization_config:
            return converted_named_params
        if quantization_config.get("quant_method") != "fp8":
            result: Named = native(args, megatron_name, converted_named_params, quantization_config)
            return result
        return quantize(
            args,
            megatron_name,
            converted_named_params,
            quantization_config,
            scale_format,
            layout=_blackwell_layout() if transform_ue8m0 else None,
        )

    done = []
    # slime HEAD defines it in `processors` and imports it by name.
    for name in (_CONVERT, f"{_CONVERT}.processors"):
        try:
            place = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        place.quantize_params = quantize_params  # type: ignore[attr-defined]
        done.append(f"{name.removeprefix('slime.backends.')}.quantize_params")
    return done


def quantize(
    args: Any,
    megatron_name: str,
    named: Named,
    config: Mapping[str, Any],
    scale_format: ScaleFormat,
    layout: Any = None,
) -> Named:
    """Return the tensors of one Megatron parameter as the server is to load them.

    Args:
        args: slime's arguments; read for `--first-last-layers-bf16`.
        megatron_name: such as `module.module.decoder.layers.3.mlp.linear_fc1.weight`.
        named: its (Hugging Face name, `[N, K]` tensor) pairs.
        config: `quantization_config` of the served model.
        scale_format: of training.
        layout: Blackwell's reordering of a scale grid, applied last; None elsewhere.

    Returns:
        The pairs unchanged where the parameter is not FP8, else for each matrix its codes `[N, K]`
        float8_e4m3fn and `weight_scale_inv` `[ceil(N / 128), ceil(K / 128)]` float32.

    Raises:
        UserError: the served model is quantized in another way, or its BF16 modules are not training's.
    """
    check_config(config)
    found = _LAYER.fullmatch(megatron_name)
    if found is None:
        return named
    if _UNTESTED.fullmatch(found.group(2)):
        raise UserError(
            f"the FP8 push of {megatron_name} was never tried: such layers are not supported"
        )
    if _LINEAR.fullmatch(found.group(2)) is None:
        return named
    kept = [skipped(name, config) for name, _ in named]
    if trained_in_bf16(args, int(found.group(1))):
        if not all(kept):
            raise UserError(
                f"--first-last-layers-bf16 trains layer {found.group(1)} in BF16, and the "
                "served model has it in "
                f"FP8; add {_module(named[0][0])} and its like to modules_to_not_convert in the config.json "
                "of --hf-checkpoint"
            )
        return named
    if any(kept) != all(kept):
        names = ", ".join(_module(name) for name, _ in named)
        raise UserError(
            f"the served model keeps only some of {names} in BF16; they are one layer, keep all or none"
        )
    if all(kept):
        return named
    out: Named = []
    for name, weight in named:
        codes, scale_inv = cast(weight, scale_format)
        out += [
            (name, codes),
            (f"{name}_scale_inv", layout(scale_inv, codes) if layout else scale_inv),
        ]
    return out


def cast(weight: Tensor, scale_format: ScaleFormat) -> tuple[Tensor, Tensor]:
    """Return (codes, scale_inv) of a weight `[N, K]`, rounded to BF16 first as training does.

    Casting the FP32 main weights instead changes 3 % of the codes.
    """
    import torch

    quantized = reference.quantize_weight(weight.detach().to(torch.bfloat16), scale_format)
    return quantized.codes, quantized.scale_inv


def check_config(config: Mapping[str, Any]) -> None:
    """Check that the served model is block-scaled E4M3 with dynamic activation scales.

    Raises:
        UserError: names the field of `quantization_config`, what it holds and what it must.
    """
    wanted = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [reference.BLOCK, reference.BLOCK],
    }
    for field, value in wanted.items():
        found = config.get(field, "e4m3" if field == "fmt" else None)
        if isinstance(found, tuple):
            found = list(found)
        if found != value:
            raise UserError(
                f"quantization_config of --hf-checkpoint has {field}: {found}, and "
                f"training's casts are {value}; "
                "make the served checkpoint with `megatron-fp8 convert hf-to-fp8`"
            )


def skipped(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the served model keeps the module of tensor `name` in BF16.

    Full names with or without `model.`, and whole dotted parts of names (`mlp.gate`), as readers accept them.
    """
    module = _module(name)
    return any(_names(entry, module) for entry in ignored(config))


def ignored(config: Mapping[str, Any]) -> Sequence[str]:
    """Return the modules that stay BF16, under both names readers know."""
    return [*(config.get("ignored_layers") or ()), *(config.get("modules_to_not_convert") or ())]


def _names(entry: str, module: str) -> bool:
    if entry in (module, module.removeprefix("model.")):
        return True
    return f".{entry.removeprefix('model.')}." in f".{module.removeprefix('model.')}."


def _module(tensor_name: str) -> str:
    return tensor_name.removesuffix(".weight")


def trained_in_bf16(args: Any, layer: int) -> bool:
    """Whether `--first-last-layers-bf16` takes this layer (of all pipeline stages) out of FP8."""
    if not getattr(args, "first_last_layers_bf16", False):
        return False
    last = args.num_layers - args.num_layers_at_end_in_bf16
    return bool(layer < args.num_layers_at_start_in_bf16 or layer >= last)


def _blackwell_layout() -> Any:
    """Return SGLang's reordering of power-of-two scales where its DeepGEMM wants one, or None.

    slime asks the same function; on Hopper it says no.
    """
    try:
        sglang = importlib.import_module("slime.backends.megatron_utils.sglang")
    except ImportError:
        return None
    asks = getattr(sglang, "should_deepgemm_weight_requant_ue8m0", None)
    if asks is None or not asks(weight_block_size=[reference.BLOCK, reference.BLOCK]):
        return None

    def layout(scale_inv: Tensor, codes: Tensor) -> Any:
        if (scale_inv.view(_int32()) & 0x007FFFFF).any():
            raise UserError(
                "this GPU's rollout kernels take power-of-two scales only, and the recipe "
                "has FP32 scales: use "
                "--fp8-recipe infir2 on Blackwell"
            )
        return sglang.transform_scale_ue8m0(scale_inv, mn=codes.shape[-2])

    return layout


def _int32() -> Any:
    import torch

    return torch.int32
