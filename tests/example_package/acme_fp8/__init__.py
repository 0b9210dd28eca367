"""A stranger's package: one recipe and one schedule, found through the entry points beside it."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_fp8_ext.recipe import FP8Recipe
from megatron_fp8_ext.schedule import WSD, DecayStyle

RECIPE = FP8Recipe(
    name="acme-fp32",
    summary="Acme: block-scaled E4M3 with FP32 scales",
    scale_format="float32",
    source="tests/example_package",
)


@dataclass(frozen=True, kw_only=True)
class Sqrt(WSD):
    """Acme: the last fifth decays by 1 - sqrt, unless the command says otherwise."""

    default_decay: ClassVar[float] = 0.2

    decay_style: DecayStyle = "minus_sqrt"
