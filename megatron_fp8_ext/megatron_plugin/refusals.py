"""Flags that cannot go with an FP8 recipe, each with its reason and its mend.

One table, so that the docs (docs/flags.md) and the tests read the same. Each row was either read in the
sources named in it or tried; a flag that is not here was trained with (docs/flags.md says where).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Refusal:
    """A flag the user wrote that the recipe contradicts, or that breaks beside it.

    Attributes:
        flag: as Megatron spells it.
        reason: what would go wrong.
        mend: what to do instead.
        allowed: values of the flag that are fine; empty where no value is.
        where: `everywhere`, or only the path that breaks.
    """

    flag: str
    reason: str
    mend: str
    allowed: tuple[str, ...] = ()
    where: Literal["everywhere", "gpu", "emulated"] = "everywhere"


REFUSALS: tuple[Refusal, ...] = (
    Refusal("--fp8-format", "the recipe is E4M3 in every GEMM", "drop the flag", ("e4m3",)),
    Refusal("--fp16", "FP8 recipes here stand on BF16", "use --bf16"),
    Refusal("--fp4-format", "one run computes in one 4- or 8-bit format", "drop one of the two"),
    Refusal(
        "--no-fp8-wgrad",
        "the recipe runs wgrad in FP8; Megatron ignores this flag for block scaling",
        "drop the flag",
    ),
    Refusal(
        "--fp8-dot-product-attention",
        "attention stays in BF16; TransformerEngine asserts "
        "against FP8 attention under block scaling",
        "drop the flag",
    ),
    Refusal(
        "--fp8-multi-head-attention",
        "attention stays in BF16; TransformerEngine asserts "
        "against FP8 attention under block scaling",
        "drop the flag",
    ),
    Refusal("--fp8-output-proj", "the LM head stays in BF16", "drop the flag"),
    Refusal(
        "--fp8-quantizer-factory",
        "the recipe names its own quantizers",
        "drop the flag, or use --fp8-recipe custom",
    ),
    Refusal(
        "--te-precision-config-file",
        "it would override the recipe module by module",
        "drop the flag, or drop --fp8-recipe and name the recipe in that file",
    ),
    Refusal("--kitchen-config-file", "it would override the recipe", "drop one of the two"),
    Refusal("--kitchen-recipe-number", "it would override the recipe", "drop one of the two"),
    Refusal("--use-kitchen", "it would override the recipe", "drop one of the two"),
    Refusal(
        "--main-params-dtype",
        "the main weights are FP32; with FP16 ones Megatron's optimizer "
        "holds no shard of an FP8 weight and fails in the first step",
        "drop the flag",
        ("fp32",),
    ),
    Refusal(
        "--yaml-cfg",
        "Megatron then ignores the command line, this flag included",
        "put fp8: e4m3, fp8_recipe: blockwise and fp8_param: true into the YAML file, or use flags",
    ),
    Refusal(
        "--tp-comm-overlap",
        "TransformerEngine's userbuffers gather BF16, per-tensor FP8 or "
        "MXFP8 tensors, not block-scaled ones",
        "drop the flag",
    ),
    Refusal(
        "--use-megatron-fsdp",
        "block-scaled FP8 parameters under Megatron-FSDP are not tested here",
        "use --use-distributed-optimizer",
    ),
    Refusal(
        "--use-custom-fsdp",
        "block-scaled FP8 parameters under Megatron-FSDP are not tested here",
        "use --use-distributed-optimizer",
    ),
    Refusal(
        "--use-torch-fsdp2",
        "Megatron turns FP8 parameters off there and says so only in a warning",
        "use --use-distributed-optimizer",
    ),
    Refusal(
        "--activation-func-fp8-input-store",
        "it is an unscaled cast of the activation input, outside the recipe's block scaling",
        "drop the flag",
    ),
    Refusal(
        "--multi-latent-attention",
        "Megatron's local attention has no heads of two sizes, and without a GPU there is no other",
        "train MLA on a GPU",
        where="emulated",
    ),
    Refusal(
        "--num-experts",
        "Megatron asks TransformerEngine for MoE in FP8, and without a GPU there is none",
        "train MoE in FP8 on a GPU, or with --fp8-recipe bf16 here",
        where="emulated",
    ),
)

# Written for another FP8 recipe and without effect under block scaling: said, not refused.
WITHOUT_EFFECT: tuple[str, ...] = (
    "--fp8-margin",
    "--fp8-interval",
    "--fp8-amax-history-len",
    "--fp8-amax-compute-algo",
    "--tp-only-amax-red",
    "--reuse-grad-buf-for-mxfp8-param-ag",
)
