"""`--lr-schedule wsd` and `--wsd-decay-from` -> Megatron's own flags. Pure: the same is the dry run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_fp8_ext import registry
from megatron_fp8_ext.errors import UserError, unknown_name
from megatron_fp8_ext.megatron_plugin import arguments
from megatron_fp8_ext.megatron_plugin.branch import FROM, PLANNED, Branch, BranchPoint
from megatron_fp8_ext.schedule import (
    STYLES,
    UNITS,
    WSD,
    Base,
    Batch,
    DecayStyle,
    Length,
    Phases,
    Unit,
    resolve,
)

SCHEDULE = "--lr-schedule"
STYLE = "--wsd-decay-style"
PHASES = ("warmup", "stable", "decay")
# Every flag of ours takes a value; this is what Megatron's --help says of it.
HELP: dict[str, str] = {
    SCHEDULE: "learning rate schedule: wsd (warmup, stable, decay) or one that a package registers",
    STYLE: f"shape of the decay: {', '.join(STYLES)}",
    FROM: "start a decay branch at this checkpoint (a folder, or one iteration of it)",
    PLANNED: "samples the stable run's data was sized for, where its checkpoint does not say",
    **{
        f"--wsd-{phase}-{unit}": f"length of the {phase} phase"
        + (" as a part of the whole run" if unit == "fraction" else f" in {unit}")
        for phase in PHASES
        for unit in UNITS
    },
}
OWN = tuple(HELP)
OVERRIDE = "--override-opt_param-scheduler"  # the one spelling that core_v0.14 knows too
# Megatron's flag -> the unit it counts in: other ways to write the same lengths.
_NATIVE: dict[str, dict[str, Unit]] = {
    "warmup": {
        "--lr-warmup-iters": "iters",
        "--lr-warmup-samples": "samples",
        "--lr-warmup-fraction": "fraction",
    },
    "stable": {},
    "decay": {"--lr-wsd-decay-iters": "iters", "--lr-wsd-decay-samples": "samples"},
}
_TOTAL: dict[str, Unit] = {"--train-iters": "iters", "--train-samples": "samples"}
_END: dict[str, Unit] = {"--lr-decay-iters": "iters", "--lr-decay-samples": "samples"}
_RAMP = ("--rampup-batch-size", "--step-batch-size-schedule")
# What a branch contradicts, and why.
_NOT_IN_A_BRANCH: dict[str, str] = {
    "--no-load-optim": "the decay continues with the optimizer state and the schedule",
    "--finetune": "it would start again at iteration 0, without the optimizer state",
    "--use-checkpoint-opt_param-scheduler": "it would take the end of the decay from the stable run",
    "--use-checkpoint-opt-param-scheduler": "it would take the end of the decay from the stable run",
    "--pretrained-checkpoint": "the branch loads the stable run's checkpoint",
    "--override-ckpt-iteration": "it would move the position in the data",
    "--phase-transition-iterations": "it would size the data anew",
    "--lr-warmup-fraction": "a branch has no warmup",
}


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    """The command with Megatron's schedule flags in place of ours.

    Attributes:
        argv: the command.
        phases: of a run from the start; None for a branch or a run without our schedule.
        style: decay style of those phases.
        branch: the decay branch.
        notes: lines for rank 0.
    """

    argv: tuple[str, ...]
    phases: Phases | None = None
    style: DecayStyle = "cosine"
    branch: Branch | None = None
    notes: tuple[str, ...] = ()


def asked(argv: Sequence[str]) -> bool:
    """Whether the command uses one of our schedule flags."""
    return arguments.first_written(argv, OWN) is not None


def expand(
    argv: Sequence[str], point: BranchPoint | None = None, started: bool = False
) -> Scheduled:
    """Turn our schedule flags in `argv` into Megatron's.

    Args:
        argv: the command.
        point: where `--wsd-decay-from` branches; None without that flag.
        started: whether the branch's own folder (`--save`) holds a checkpoint already.

    Raises:
        UserError: lengths that are missing, contradict each other or Megatron's flags.
    """
    for name in (token.split("=")[0] for token in argv):
        if name.startswith("--wsd-") and name not in OWN:
            raise unknown_name("flag", name, [own for own in OWN if own.startswith("--wsd-")])
    if not asked(argv):
        return Scheduled(argv=tuple(argv))
    if arguments.has(argv, "--yaml-cfg"):
        own = arguments.first_written(argv, OWN)
        raise UserError(
            f"{own} contradicts --yaml-cfg: Megatron then ignores the command line; put the native "
            "flags (megatron-fp8 expand) into the YAML file"
        )
    if point is not None:
        return _branch(list(argv), point, started)
    return _from_start(list(argv))


def schedule_class(argv: Sequence[str]) -> type[WSD]:
    """Return the schedule named by `--lr-schedule` (WSD itself without one).

    Raises:
        UserError: unknown name, or a registered object that is no WSD.
    """
    name = arguments.value(argv, SCHEDULE)
    if name is None:
        if arguments.has(argv, SCHEDULE):
            raise UserError(f"{SCHEDULE} needs a name: {', '.join(registry.names('schedule'))}")
        return WSD
    if name not in registry.names("schedule"):
        raise unknown_name(SCHEDULE, name, registry.names("schedule"))
    found = registry.lookup("schedule", name)
    if not (isinstance(found, type) and issubclass(found, WSD)):
        raise UserError(
            f"schedule '{name}' is not a subclass of megatron_fp8_ext.schedule.WSD: Megatron has no "
            "other schedule with a stable phase"
        )
    return found


def _from_start(argv: list[str]) -> Scheduled:
    if not arguments.has(argv, SCHEDULE):
        own = arguments.first_written(argv, OWN)
        needs = "--wsd-decay-from CHECKPOINT" if own == PLANNED else f"{SCHEDULE} wsd"
        raise UserError(f"{own} needs {needs}: add it")
    if arguments.has(argv, PLANNED):
        raise UserError(f"{PLANNED} needs {FROM} CHECKPOINT: drop it, or add that")
    kind = schedule_class(argv)
    phases = phases_of(argv, kind)
    style = decay_style(argv) or kind.decay_style
    WSD(  # refuses a decay that begins inside the warmup
        lr=0,
        min_lr=0,
        warmup_samples=phases.warmup,
        total_samples=phases.total,
        decay_samples=phases.decay,
    )
    _agree(argv, {flag: phases.total for flag, unit in _END.items() if unit == phases.base})
    _agree(argv, {"--lr-decay-style": "WSD"})
    base = phases.base
    native = {
        f"--train-{base}": str(phases.total),
        "--lr-decay-style": "WSD",
        "--lr-wsd-decay-style": style,
        f"--lr-warmup-{base}": str(phases.warmup),
        f"--lr-decay-{base}": str(phases.total),
        f"--lr-wsd-decay-{base}": str(phases.decay),
    }
    word = {"iters": "iterations", "samples": "samples"}[base]
    shape = f"{style} decay {phases.decay}" if phases.decay else "no decay (branch it later)"
    summary = (
        f"{SCHEDULE} {arguments.value(argv, SCHEDULE)} -> {_shown(native)} | warmup {phases.warmup}, "
        f"stable {phases.stable}, {shape}: {phases.total} {word}"
    )
    return Scheduled(
        argv=(*_stripped(argv), *_flat(native)), phases=phases, style=style, notes=(summary,)
    )


def _branch(argv: list[str], point: BranchPoint, started: bool) -> Scheduled:
    written = arguments.first_written(argv, _NOT_IN_A_BRANCH)
    if written is not None:
        raise UserError(f"{FROM} contradicts {written}: {_NOT_IN_A_BRANCH[written]}; drop the flag")
    for phase in ("warmup", "stable"):
        own = arguments.first_written(argv, [f"--wsd-{phase}-{unit}" for unit in UNITS])
        if own is not None:
            raise UserError(
                f"{FROM} contradicts {own}: a branch begins where the checkpoint stands; drop the flag"
            )
    for flag, size in (
        ("--lr-warmup-iters", point.global_batch_size),
        ("--lr-warmup-samples", 1),
    ):
        warmup = number(argv, flag)
        if warmup and warmup * size != point.warmup_samples:
            raise UserError(
                f"{flag} {warmup} contradicts {FROM} {point.name}: a branch has no warmup; drop {flag}"
            )
    made = plan_branch(argv, point)
    load = arguments.value(argv, "--save") if started else None
    native = made.flags(load)
    exact: dict[str, str | int] = {
        "--train-iters": made.end_iteration,
        "--train-samples": made.end_samples,
        "--lr-decay-style": "WSD",
        "--global-batch-size": point.global_batch_size,
        "--lr-wsd-decay-samples": made.decay_samples,
        "--lr-decay-samples": made.schedule.total_samples,
        "--lr-decay-iters": made.schedule.total_samples // point.global_batch_size,
    }
    _agree(argv, exact, f"{FROM} {point.name}, which makes it")
    out = _stripped(argv)
    for flag in ("--load", "--ckpt-step", "--lr", "--min-lr", "--global-batch-size"):
        out = arguments.without(out, flag, takes_value=True)
    out += _flat(native)
    if not arguments.first_written(out, (OVERRIDE, "--override-opt-param-scheduler")):
        out.append(OVERRIDE)
    notes = [
        f"{FROM} {point.name} -> {_shown(native)} {OVERRIDE} | learning rate {made.lr:g} -> "
        f"{made.min_lr:g} by {made.decay_style} over {made.decay_iters} iterations, "
        f"{point.iteration} to {made.end_iteration} | data in the order of the stable run's "
        f"{point.planned_samples} samples, from sample {point.consumed_samples}"
    ]
    if made.lr != point.lr:
        notes.append(
            f"--lr {made.lr:g}: the learning rate JUMPS from {point.lr:g} at iteration {point.iteration}"
        )
    return Scheduled(argv=tuple(out), branch=made, notes=tuple(notes))


def plan_branch(argv: Sequence[str], point: BranchPoint) -> Branch:
    """Return the branch that the command makes at `point`.

    Raises:
        UserError: no decay length, or a learning rate that cannot be.
    """
    length = _length(argv, "decay")
    if length is None:
        raise UserError(f"{FROM} needs the length of the decay: add --wsd-decay-iters N")
    if length.unit == "fraction":
        if not 0 < length.value < 1:
            raise UserError(f"{length}: a fraction of the whole run lies between 0 and 1")
        iterations = round(point.iteration * length.value / (1 - length.value))
    else:
        batch = Batch(point.global_batch_size, point.seq_length)
        iterations = batch.length_in(length, "iters")
    if iterations < 1:
        raise UserError(f"{length} is no iteration at all: give a longer decay")
    lr, min_lr = number(argv, "--lr"), number(argv, "--min-lr")
    rate = point.lr if lr is None else float(lr)
    low = point.min_lr if min_lr is None else float(min_lr)
    if low > rate:
        raise UserError(f"--min-lr {low:g} is above the learning rate {rate:g} that decays to it")
    style = decay_style(argv) or point.decay_style
    return Branch(point=point, decay_iters=iterations, decay_style=style, lr=rate, min_lr=low)


def phases_of(argv: Sequence[str], kind: type[WSD]) -> Phases:
    """Return the phases of a run from the start."""
    lengths = {phase: _length(argv, phase) for phase in PHASES}
    total = _one_of(argv, _TOTAL, "the run")
    written = [length for length in (*lengths.values(), total) if length is not None]
    ramp = arguments.first_written(argv, _RAMP)
    by_samples = ramp is not None or any(length.unit == "samples" for length in written)
    base: Base = "samples" if by_samples else "iters"
    if ramp is not None:
        for length in written:
            if length.unit == "iters":
                raise UserError(f"{length} contradicts {ramp}: give samples or tokens instead")
    batch = batch_of(argv)
    return resolve(
        lengths["warmup"],
        lengths["stable"],
        lengths["decay"],
        total,
        base,
        batch,
        kind.default_decay,
    )


def native_phases(argv: Sequence[str]) -> tuple[Phases, DecayStyle]:
    """Return the phases and the decay style of a command in Megatron's own flags.

    Raises:
        UserError: its schedule has no stable phase.
    """
    kind = arguments.value(argv, "--lr-decay-style")
    if kind not in ("WSD", "constant"):
        shown = f"--lr-decay-style {kind or 'linear'}{'' if kind else ' (as none is given)'}"
        raise UserError(f"{shown} has no stable phase to plan: add {SCHEDULE} wsd")
    for unit in ("iters", "samples"):
        end = arguments.value(argv, f"--lr-decay-{unit}")
        if end is not None:  # the schedule may end before or after the run
            argv = [*argv, f"--train-{unit}", end]
    if kind == "constant":
        for flag in _NATIVE["decay"]:
            argv = arguments.without(argv, flag, takes_value=True)
    return phases_of(argv, WSD), decay_style(argv) or "exponential"  # Megatron's default


def batch_of(argv: Sequence[str]) -> Batch:
    """Return what the command says of `--global-batch-size` and `--seq-length`."""
    sizes = []
    for flag in ("--global-batch-size", "--seq-length"):
        found = number(argv, flag)
        if found is not None and found <= 0:
            raise UserError(f"{flag} {found} is not a positive number")
        sizes.append(None if found is None else int(found))
    return Batch(*sizes)


def decay_style(argv: Sequence[str]) -> DecayStyle | None:
    """Return the decay style that is written, in our flag or Megatron's."""
    written = {flag: arguments.value(argv, flag) for flag in (STYLE, "--lr-wsd-decay-style")}
    named = {flag: style for flag, style in written.items() if style is not None}
    if len(set(named.values())) > 1:
        (a, x), (b, y) = named.items()
        raise UserError(f"{a} {x} contradicts {b} {y}: drop one of the two")
    for flag, style in named.items():
        found = next((known for known in STYLES if known == style), None)
        if found is None:
            raise unknown_name(flag, style, STYLES)
        return found
    return None


def number(argv: Sequence[str], flag: str) -> Fraction | None:
    """Return the number written for `flag`; None if it is not written.

    Raises:
        UserError: it is no number.
    """
    text = arguments.value(argv, flag)
    if text is None:
        if arguments.has(argv, flag):
            raise UserError(f"{flag} needs a number")
        return None
    try:
        return Fraction(text.replace("_", ""))
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{flag} {text}: not a number") from error


def _length(argv: Sequence[str], phase: str) -> Length | None:
    own = {f"--wsd-{phase}-{unit}": unit for unit in UNITS}
    return _one_of(argv, {**own, **_NATIVE[phase]}, f"the {phase}")


def _one_of(argv: Sequence[str], flags: Mapping[str, Unit], what: str) -> Length | None:
    found: list[Length] = []
    for flag, unit in flags.items():
        value = number(argv, flag)
        if value is None:
            continue
        if value < 0 or (unit == "fraction" and value > 1):
            raise UserError(f"{flag} {arguments.value(argv, flag)}: no possible length")
        if unit in ("iters", "samples") and value.denominator != 1:
            raise UserError(f"{flag} {arguments.value(argv, flag)}: not a whole number")
        found.append(Length(value, unit, flag))
    if len(found) > 1 and len({(x.value, x.unit) for x in found}) > 1:
        raise UserError(f"{found[0]} contradicts {found[1]} as the length of {what}: drop one")
    return found[0] if found else None


def _agree(argv: Sequence[str], wanted: Mapping[str, str | int], because: str = "") -> None:
    """Refuse a flag of Megatron that is written with another value."""
    for flag, value in wanted.items():
        written = arguments.value(argv, flag)
        if written is None:
            continue
        same = number(argv, flag) == value if isinstance(value, int) else written == value
        if not same:
            reason = because or f"{SCHEDULE} {arguments.value(argv, SCHEDULE)}, which makes it"
            raise UserError(f"{flag} {written} contradicts {reason} {value}: drop {flag}")


def _stripped(argv: Sequence[str]) -> list[str]:
    out = list(argv)
    native = [flag for flags in _NATIVE.values() for flag in flags]
    for flag in (*OWN, *native, *_TOTAL, *_END, "--lr-decay-style", "--lr-wsd-decay-style"):
        out = arguments.without(out, flag, takes_value=True)
    return out


def _flat(native: Mapping[str, str]) -> list[str]:
    return [token for pair in native.items() for token in pair]


def _shown(native: Mapping[str, str]) -> str:
    return " ".join(_flat(native))
