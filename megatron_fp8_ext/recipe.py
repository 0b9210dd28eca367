"""What an FP8 recipe is: which operand is cast how, in which of the three GEMMs.

A linear layer y = x W^T has three GEMMs, and each reads two operands:

    fprop   y  = x  W^T     x: input       W: weight
    dgrad   dx = dy W       dy: grad       W: weight
    wgrad   dW = dy^T x     dy: grad       x: input     (both cast along the token axis)

`infir2` is the recipe of InfiR2 (arXiv 2509.22536, section 3): E4M3 in all of them, one scale for
128 consecutive values of inputs and gradients, one for each 128x128 block of a weight, scales
that are powers of two. Stated openly: on TransformerEngine that is `Float8BlockScaling` with
E4M3, which is why a checkpoint needs nothing of ours to load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_fp8_ext import registry
from megatron_fp8_ext.errors import UserError

ScaleFormat = Literal["power_of_two", "float32"]
# e4m1 is no format of any hardware: E4M3 whose mantissa is rounded to one bit, for the negative control.
Format = Literal["e4m3", "e5m2", "e4m1"]

# TransformerEngine reads this once, at import, as the default of Float8BlockScaling (TE >= 2.3).
TE_FP32_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
# TE >= 2.15: would silently run the backward GEMMs in another precision.
TE_BACKWARD_OVERRIDE = "NVTE_BACKWARD_OVERRIDE"


@dataclass(frozen=True, kw_only=True)
class Cast:
    """How one operand is cast: its 8-bit format and the block that shares a scale.

    Attributes:
        dtype: the format of the codes.
        block: rows and columns that share a scale, or `tensor` for one scale in all.
        scaled: False fixes every scale at 1 (negative controls).
    """

    dtype: Format = "e4m3"
    block: tuple[int, int] | Literal["tensor"] = (1, 128)
    scaled: bool = True

    def __str__(self) -> str:
        block = "per tensor" if self.block == "tensor" else f"{self.block[0]}x{self.block[1]}"
        return f"{self.dtype} {block}" + ("" if self.scaled else ", unscaled")


@dataclass(frozen=True, kw_only=True)
class FP8Recipe:
    """A named FP8 recipe.

    Attributes:
        name: the value of `--fp8-recipe`.
        summary: one line for `megatron-fp8 list`.
        input: cast of activations; None leaves the run in BF16 (then all three are None).
        weight: cast of weights.
        grad_output: cast of gradients.
        scale_format: `power_of_two` (E8M0 values in FP32 containers) or `float32`.
        param_gather: keep the weights themselves in FP8 and all-gather them so, where the
            optimizer of the run allows it.
        high_precision: parts of the model that stay in BF16, for the summary line.
        source: where the recipe is defined.
        control: a negative control, meant to train badly: any casts, emulated only.
    """

    name: str
    summary: str
    input: Cast | None = Cast(block=(1, 128))
    weight: Cast | None = Cast(block=(128, 128))
    grad_output: Cast | None = Cast(block=(1, 128))
    scale_format: ScaleFormat = "power_of_two"
    param_gather: bool = True
    high_precision: tuple[str, ...] = ("embedding", "LM head", "norms", "attention")
    source: str = ""
    control: bool = False

    def __post_init__(self) -> None:
        casts = (self.input, self.weight, self.grad_output)
        if any(cast is None for cast in casts):
            if any(cast is not None for cast in casts):
                raise UserError(
                    f"recipe '{self.name}': input, weight and grad_output must all be cast or "
                    "all be None; no GEMM on Hopper takes one FP8 and one BF16 operand"
                )
            return
        if self.control:
            return
        blocks = tuple(cast.block for cast in casts if cast is not None)
        if any(cast is not None and (cast.dtype != "e4m3" or not cast.scaled) for cast in casts):
            raise UserError(
                f"recipe '{self.name}': only scaled e4m3 has a block-scaled GEMM; other casts are for "
                "negative controls (control=True), which are emulated"
            )
        if blocks != ((1, 128), (128, 128), (1, 128)):
            raise UserError(
                f"recipe '{self.name}': blocks {blocks} have no block-scaled GEMM; use 1x128 for "
                "input and grad_output and 128x128 for weight"
            )
        if self.scale_format not in ("power_of_two", "float32"):
            raise UserError(
                f"recipe '{self.name}': scale_format '{self.scale_format}' is neither "
                "'power_of_two' nor 'float32'"
            )

    @property
    def is_fp8(self) -> bool:
        """Whether any GEMM runs in FP8."""
        return self.weight is not None

    @property
    def environment(self) -> dict[str, str]:
        """Environment that pins the scale format; must be set before TransformerEngine is imported.

        Always explicit, because today's slime sets FP32 scales for every actor unless told not to.
        """
        if not self.is_fp8:
            return {}
        return {TE_FP32_SCALES: "1" if self.scale_format == "float32" else "0"}

    def short_str(self) -> str:
        """One phrase for logs, such as `E4M3, power-of-two scales, fprop+dgrad+wgrad in FP8`."""
        if not self.is_fp8:
            return "BF16, no FP8"
        if self.control:
            return f"NEGATIVE CONTROL: {self.summary}"
        scales = {"power_of_two": "power-of-two (E8M0)", "float32": "FP32"}[self.scale_format]
        return (
            f"E4M3 weights 128x128, activations and gradients 1x128, {scales} scales, "
            "fprop+dgrad+wgrad in FP8"
        )


INFIR2 = FP8Recipe(
    name="infir2",
    summary="InfiR2 pre-training and SFT: block-scaled E4M3, power-of-two scales",
    source="arXiv 2509.22536, section 3; the reference's CPT and SFT scripts",
)
INFIR2_RL = FP8Recipe(
    name="infir2-rl",
    summary="InfiR2 reinforcement learning: as infir2, with FP32 scales",
    scale_format="float32",
    source="the reference's RL scripts (NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1)",
)
BF16 = FP8Recipe(
    name="bf16",
    summary="no FP8: the same command as a BF16 baseline",
    input=None,
    weight=None,
    grad_output=None,
    param_gather=False,
    high_precision=("everything",),
    source="Megatron-LM without --fp8-format",
)
# Two ways of training badly, so that a comparison which passes them is known to prove nothing.
CONTROL_1BIT = FP8Recipe(
    name="control-1bit",
    summary="negative control: infir2 with one mantissa bit instead of three",
    input=Cast(dtype="e4m1", block=(1, 128)),
    weight=Cast(dtype="e4m1", block=(128, 128)),
    grad_output=Cast(dtype="e4m1", block=(1, 128)),
    param_gather=False,
    source="docs/proof.md",
    control=True,
)
CONTROL_E5M2 = FP8Recipe(
    name="control-e5m2",
    summary="negative control: E5M2 everywhere, one scale of 1 for each tensor",
    input=Cast(dtype="e5m2", block="tensor", scaled=False),
    weight=Cast(dtype="e5m2", block="tensor", scaled=False),
    grad_output=Cast(dtype="e5m2", block="tensor", scaled=False),
    param_gather=False,
    source="docs/proof.md",
    control=True,
)


def get_recipe(name: str) -> FP8Recipe:
    """Return the recipe registered as `name`.

    Raises:
        UserError: unknown name, or the entry point is not an FP8Recipe.
    """
    found = registry.lookup("recipe", name)
    if not isinstance(found, FP8Recipe):
        raise UserError(
            f"recipe '{name}' is a {type(found).__name__}, not a megatron_fp8_ext.recipe.FP8Recipe"
        )
    if found.name != name:
        raise UserError(f"recipe '{name}' calls itself '{found.name}': use one name for both")
    return found
