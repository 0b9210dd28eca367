"""What a run left behind: its log is the record, `member.json` and `state.json` say what and how."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_fp8_ext import training_log
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import arguments, packed_flags
from megatron_fp8_ext.proof.plan import BASELINE, RUN
from megatron_fp8_ext.training_log import Iteration

MEMBER, STATE, SCORES = "member.json", "state.json", "scores.json"

Status = Literal["finished", "crashed", "interrupted", "not started"]
_MEMORY = re.compile(r"memory \(MB\).*\| max allocated: ([\d.]+).*\| max reserved: ([\d.]+)")
VERSIONS = "megatron_fp8_ext: versions: "
_CASTS = re.compile(r"emulated casts on rank 0: (.*)")
# Where these lead is no difference: what lies there is compared by its digest.
_PLACES = {
    "--data-path", "--train-data-path", "--data-cache-path", packed_flags.DATA, "--load", "--master-port",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One member as its folder shows it.

    Attributes:
        folder: of the member.
        recipe: label, as after `--recipes`.
        is_fp8: whether it was to cast anything.
        control: whether it is a negative control.
        seed: of the run.
        steps: planned iterations.
        status: how it ended.
        why: for all but `finished`, the last words of its log; else why `--score` failed, or empty.
        iterations: logged iterations by number; of repeated ones (after a resume) the last.
        losses: LM loss by iteration. The second iteration after a start is left out, because Megatron
            logs the mean of the first two there.
        versions: of the stack and the device; empty where the run did not get so far.
        casts: emulated casts of the last attempt, by operand.
        samples: records of the numerics taps, by iteration and rank.
        peak_gpu_mb: largest `max reserved` that the log names; None on a CPU.
        peak_resident_mb: largest resident set of its processes; None where not measured.
        seconds: wall-clock time of the last attempt.
        sharing: runs that shared its device, itself included; 1 where it was alone.
        scores: what `--score` measured after the run.
        described: member.json, as written.
    """

    folder: Path
    recipe: str
    is_fp8: bool
    control: bool
    seed: int
    steps: int
    status: Status
    why: str
    iterations: dict[int, Iteration]
    losses: dict[int, float]
    versions: dict[str, str]
    casts: dict[str, int]
    samples: list[dict[str, Any]]
    peak_gpu_mb: float | None
    peak_resident_mb: float | None
    seconds: float | None
    sharing: int
    scores: dict[str, float]
    described: dict[str, Any]

    @property
    def ended_well(self) -> bool:
        """Whether it finished, and so did its score."""
        return self.status == "finished" and not self.why

    @property
    def sequence_length(self) -> int | None:
        """`--seq-length` of its command."""
        written = arguments.value(self.described["argv"], "--seq-length")
        return int(written) if written is not None and written.isdigit() else None


def status(folder: Path) -> Status:
    """Return how the run in `folder` ended; one that was killed without a word is interrupted."""
    found = state(folder).get("status", "not started")
    return "interrupted" if found == "running" else found


def state(folder: Path) -> dict[str, Any]:
    """Return state.json; empty before a run began."""
    file = folder / STATE
    return json.loads(file.read_text()) if file.is_file() else {}


def read_all(folders: Sequence[Path]) -> list[Run]:
    """Read every run under `folders`, sorted by seed and recipe.

    Raises:
        UserError: nothing there; a run twice; two runs that must not be compared.
    """
    found: dict[tuple[str, int], Run] = {}
    for folder in folders:
        files = sorted(folder.rglob(MEMBER))
        if not files:
            raise UserError(
                f"{folder}: no {MEMBER} in it or below; give the --output of `megatron-fp8 compare`"
            )
        for file in files:
            run = read(file.parent)
            other = found.setdefault((run.recipe, run.seed), run)
            if other is not run and other.folder.resolve() != run.folder.resolve():
                raise UserError(
                    f"{other.folder} and {run.folder} are both {run.recipe} with seed {run.seed}; "
                    "leave one out"
                )
    runs = sorted(found.values(), key=lambda r: (r.recipe != BASELINE, r.control, r.recipe, r.seed))
    check_comparable(runs)
    return runs


def read(folder: Path) -> Run:
    """Read one member's folder.

    Raises:
        UserError: `member.json` is damaged.
    """
    try:
        described = json.loads((folder / MEMBER).read_text())
        identity = {key: described[key] for key in ("recipe", "is_fp8", "control", "seed", "steps")}
        described["argv"], described["common"], described["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MEMBER} is damaged: {error!r}; delete the folder") from error
    ended = state(folder)
    log = folder / "log.txt"
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    iterations, losses = _iterations(lines)
    scores = folder / SCORES
    return Run(
        folder=folder,
        **identity,
        status=status(folder),
        why=str(ended.get("last_words", "killed" if ended.get("status") == "running" else "")),
        iterations=iterations,
        losses=losses,
        versions=_versions(lines),
        casts=_casts(lines),
        samples=_samples(folder),
        peak_gpu_mb=_peak_gpu(lines),
        peak_resident_mb=ended.get("peak_resident_mb"),
        seconds=ended.get("seconds"),
        sharing=int(ended.get("sharing", 1)),
        scores=json.loads(scores.read_text()) if scores.is_file() else {},
        described=described,
    )


def _iterations(lines: Iterable[str]) -> tuple[dict[int, Iteration], dict[int, float]]:
    iterations: dict[int, Iteration] = {}
    losses: dict[int, float] = {}
    since_start = 0
    for line in lines:
        if line.startswith("$ "):
            since_start = 0
            continue
        found = training_log.parse_line(line)
        if found is None:
            continue
        since_start += 1
        iterations[found.number] = found
        losses.pop(found.number, None)
        if found.loss is not None and since_start != 2:
            losses[found.number] = found.loss
    return iterations, losses


def _versions(lines: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in lines:
        if line.startswith(VERSIONS):
            found = json.loads(line[len(VERSIONS) :])
    return found


def _casts(lines: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in lines:
        match = _CASTS.search(line)
        if match is not None:
            pairs = re.findall(r"([a-z ]+?) (\d+)(?:, |$)", match.group(1))
            found = {name: int(count) for name, count in pairs}
    return found


def _samples(folder: Path) -> list[dict[str, Any]]:
    """Records of the taps; after a resume the last one of an iteration, of each rank."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for file in sorted(folder.glob("fp8_stats-rank*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the run was killed in the middle of its last line
            found[(record["iteration"], file.name)] = record
    return [found[key] for key in sorted(found)]


def _peak_gpu(lines: Iterable[str]) -> float | None:
    peaks = [float(m.group(2)) for line in lines if (m := _MEMORY.search(line))]
    return max(peaks) if peaks and max(peaks) > 0 else None


def check_comparable(runs: Sequence[Run]) -> None:
    """Check that the runs differ in recipe and seed alone.

    Raises:
        UserError: names the first difference in command, length, data, versions or device.
    """
    first = runs[0]
    for run in runs[1:]:
        difference = first_difference(first.described, run.described)
        if difference is not None:
            raise UserError(f"{first.folder} and {run.folder} must not be compared: {difference}")
    versioned = [run for run in runs if run.versions]
    for run in versioned[1:]:
        a, b = versioned[0], run
        for name in sorted({*a.versions, *b.versions}):
            ours, theirs = a.versions.get(name, "none"), b.versions.get(name, "none")
            if ours != theirs:
                raise UserError(
                    f"{a.folder} and {b.folder} must not be compared: {name} is {ours} in one and "
                    f"{theirs} in the other"
                )


def first_difference(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """Say how two descriptions differ in what must be the same, or return None."""
    if a["steps"] != b["steps"]:
        return f"{a['steps']} steps in one, {b['steps']} in the other"
    ours, theirs = _by_flag(a["common"]), _by_flag(b["common"])
    for flag in sorted({*ours, *theirs}):
        x, y = ours.get(flag), theirs.get(flag)
        if x != y:
            shown = ["absent" if v is None else " ".join([flag, *v]).strip() for v in (x, y)]
            return f"'{shown[0]}' in one, '{shown[1]}' in the other"
    if a["data"] != b["data"]:
        names = sorted({*a["data"], *b["data"]})
        name = next(n for n in names if a["data"].get(n) != b["data"].get(n))
        x, y = (side["data"].get(name, {}).get("bytes", "no") for side in (a, b))
        return f"the data '{name}' is not the same ({x} and {y} bytes)"
    return None


def _by_flag(command: Sequence[str]) -> dict[str, list[str]]:
    """Group a command by flag; the words before the first flag are the program's."""
    groups: dict[str, list[str]] = {"": []}
    flag = ""
    for word in command:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            groups[flag] = [value] if equals else []
        else:
            groups.setdefault(flag, []).append(word)
    groups[""] = [Path(word).name for word in groups[""]]
    # A folder of each run's own (`{run}`) has no common digest: there the path is what is compared.
    return {
        flag: words
        for flag, words in groups.items()
        if flag not in _PLACES or any(RUN in word for word in words)
    }
