"""The sides of a comparison by name: `infir2+stash` is infir2 with the option `stash`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fp8_ext.errors import UserError, unknown_name
from megatron_fp8_ext.megatron_plugin import linear_loss

# What a side adds to the command that all of them share. `bf16` and `te-blockwise` use Megatron's own flags.
SIDES: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "te-blockwise": ("--fp8-format", "e4m3", "--fp8-recipe", "blockwise", "--fp8-param-gather"),
    "infir2": ("--fp8-recipe", "infir2"),
}
OPTIONS: dict[str, tuple[str, ...]] = {
    "chunked": ("--linear-cross-entropy", "chunked"),
    "native-ce": ("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "native"),
    # Megatron 0.19 refuses this on its command line; `step_timing` sets it after the check.
    "te-ce": ("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "te"),
    "one-pass": ("--linear-cross-entropy", "one-pass"),
    "full-logits": ("--linear-cross-entropy", "off"),
    "bf16-weights": ("--no-fp8-param-gather",),
    "fused": ("--infir2-fused",),
    "unfused": ("--no-infir2-fused",),
    "stash": ("--infir2-stash",),
    "graphs": ("--cuda-graph-impl", "local", "--te-rng-tracker"),
    "recompute": ("--recompute-granularity", "selective", "--recompute-modules", "mlp"),
}
_INFIR2_ONLY = ("bf16-weights", "fused", "unfused", "stash")
_LOSSES = ("chunked", "one-pass", "native-ce", "te-ce", "full-logits")


@dataclass(frozen=True)
class Side:
    """One side.

    Attributes:
        name: as written.
        flags: what it adds to the command.
        loss: how it computes the cross-entropy.
    """

    name: str
    flags: tuple[str, ...]
    loss: str


def parse(text: str) -> tuple[Side, ...]:
    """Return the sides of `bf16,infir2+stash`; the first is what the others are compared with.

    Raises:
        UserError: an unknown side or option, one side twice, or fewer than one.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError("--compare names no side: give it bf16,te-blockwise,infir2 or some of them")
    if len(set(names)) != len(names):
        raise UserError(f"--compare {text} names a side twice; drop one")
    return tuple(_side(name) for name in names)


def _side(name: str) -> Side:
    base, *options = name.split("+")
    if base not in SIDES:
        raise unknown_name("side of --compare", base, SIDES)
    for option in options:
        if option not in OPTIONS:
            raise unknown_name(f"option of side {base}", option, OPTIONS)
    foreign = [option for option in options if option in _INFIR2_ONLY]
    if base != "infir2" and foreign:
        raise UserError(f"--compare {name}: {foreign[0]} is an option of infir2 alone")
    flags = list(SIDES[base])
    losses = [option for option in options if option in _LOSSES]
    if len(losses) > 1:
        raise UserError(f"--compare {name}: {' and '.join(losses)} are two losses; drop one")
    for option in options:
        flags += OPTIONS[option]
    return Side(name, tuple(flags), _loss(base, options, flags))


def _loss(base: str, options: list[str], flags: list[str]) -> str:
    """Name the cross-entropy that the plugin will take for these flags."""
    if "native-ce" in options:
        return "Megatron's native fusion"
    if "te-ce" in options:
        return "TransformerEngine's"
    argv, asked = linear_loss.take(flags)
    fused = base == "infir2" and "unfused" not in options
    chosen = linear_loss.chosen(asked, argv, fused)
    return "Megatron's default" if chosen == "off" else chosen
