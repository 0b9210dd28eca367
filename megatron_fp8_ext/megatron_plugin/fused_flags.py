"""`--infir2-fused`, `--no-infir2-fused` and `--infir2-stash`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import arguments

ON = "--infir2-fused"
OFF = "--no-infir2-fused"
STASH = "--infir2-stash"
FLAGS = (ON, OFF, STASH)
# The way in where no command line reaches (a Ray actor): `off`, `on` or `stash`.
VARIABLE = "MEGATRON_FP8_EXT_FUSED"
DEFAULT = "on"
# Who computes, where that is not to be chosen by itself: `kernels.hopper` and `kernels.cublaslt` read these.
BACKENDS = {"MEGATRON_FP8_EXT_KERNELS": ("triton",), "MEGATRON_FP8_EXT_GEMM": ("te", "cublaslt")}
HELP = {
    ON: "compute norm-QKV, projection and MLP as fused functions where possible (Hopper)",
    OFF: "compute every layer as TransformerEngine does, without the fused functions",
    STASH: "keep fc1's output for the backward in 8 bits instead of BF16 (less memory)",
}


@dataclass(frozen=True)
class Fused:
    """What the run asks of the fused path.

    Attributes:
        on: whether layers may be fused.
        stash: whether a fused MLP keeps fc1's output in 8 bits.
    """

    on: bool
    stash: bool

    @property
    def text(self) -> str:
        """The value of VARIABLE that says the same."""
        return "stash" if self.stash else "on" if self.on else "off"


NOT_FUSED = Fused(on=False, stash=False)


def take(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[list[str], Fused]:
    """Return `argv` without our flags, and what they ask for.

    Raises:
        UserError: flags that contradict each other, or an unknown value in the environment.
    """
    on, off, stash = (arguments.has(argv, flag) for flag in FLAGS)
    if off and stash:
        raise UserError(f"{OFF} contradicts {STASH}: only a fused layer has that stash; drop one")
    if off and on:
        raise UserError(f"{OFF} contradicts {ON}; drop one of the two")
    inherited = environ.get(VARIABLE, DEFAULT)
    if inherited not in ("off", "on", "stash"):
        raise UserError(f"{VARIABLE}={inherited} in the environment: give it off, on or stash")
    for variable, values in BACKENDS.items():
        chosen = environ.get(variable)
        if chosen and chosen not in values:
            known = " or ".join(values)
            raise UserError(f"{variable}={chosen} in the environment: give it {known}, or unset it")
    out = list(argv)
    for flag in FLAGS:
        out = arguments.without(out, flag, takes_value=False)
    if on or off or stash:
        return out, Fused(on=not off, stash=stash)
    return out, Fused(on=inherited != "off", stash=inherited == "stash")


def may_be_on(argv: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether layers may be fused; what contradicts itself is `take`'s to refuse."""
    if any(arguments.has(argv, flag) for flag in FLAGS):
        return not arguments.has(argv, OFF)
    return environ.get(VARIABLE, DEFAULT) != "off"
