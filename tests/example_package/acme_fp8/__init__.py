"""A stranger's package: one recipe, found through the entry point beside it."""

from megatron_fp8_ext.recipe import FP8Recipe

RECIPE = FP8Recipe(
    name="acme-fp32",
    summary="Acme: block-scaled E4M3 with FP32 scales",
    scale_format="float32",
    source="tests/example_package",
)
