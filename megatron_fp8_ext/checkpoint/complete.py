"""Which checkpoint of a folder is complete, and which of them a run should continue from.

Megatron writes the data, the index, `metadata.json` and then `latest_checkpointed_iteration.txt`, the last
two in place. A run killed in between leaves a folder without its end, a complete one that the tracker
does not name, or an empty tracker, on which Megatron stops.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

from megatron_fp8_ext.checkpoint import layout
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.files import write_atomically

# Both `.metadata` and this file exist only in the torch_dist format.
LAST_FILE = "metadata.json"


def folder_of(root: Path, iteration: int) -> Path:
    """Return where Megatron keeps an iteration."""
    return root / f"iter_{iteration:07d}"


def gap(folder: Path) -> str | None:
    """Say what a `torch_dist` checkpoint lacks, in a clause; None if it is complete."""
    if not folder.is_dir():
        return "it is not there"
    if any(folder.glob("mp_rank_*")):
        return "it is in the legacy format torch, not torch_dist"
    try:
        json.loads((folder / LAST_FILE).read_text())
    except OSError:
        return f"it has no {LAST_FILE}, which is written last"
    except ValueError:
        return f"its {LAST_FILE} is cut short"
    try:
        index = layout.load_index(folder)
    except UserError as error:
        return str(error)
    ends: dict[str, int] = {}
    for _, piece in index.stored:
        ends[piece.file] = max(ends.get(piece.file, 0), piece.offset + piece.length)
    for name, end in ends.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"its file {name} is missing"
        if size < end:
            return f"its file {name} has {size} of {end} bytes"
    if not any(name.startswith("common_state/") for name in index.entries):
        # Up to megatron-core 0.18 the arguments and the schedule lie in a file of their own.
        if not zipfile.is_zipfile(folder / "common.pt"):
            return "its file common.pt is missing or cut short"
    return None


@dataclass(frozen=True)
class Choice:
    """Which iteration a run continues from.

    Attributes:
        iteration: None to start from the beginning.
        reason: why it is not simply what the tracker says; None if it is.
        repair: whether the tracker has to be written anew for Megatron to load that iteration.
    """

    iteration: int | None
    reason: str | None = None
    repair: bool = False


def choose(root: Path) -> Choice | None:
    """Return what a run with `--load ROOT` should continue from; None where that is Megatron's choice.

    A tracker that names a complete checkpoint is obeyed, except that a complete one that was finished
    after the tracker was written goes first: the run was killed between the two.

    Raises:
        UserError: the tracker names a checkpoint, and none in the folder is complete.
    """
    tracker = root / layout.TRACKER
    try:
        text: str | None = tracker.read_text().strip()
    except FileNotFoundError:
        text = None
    except OSError as error:
        raise UserError(f"--load {root}: cannot read {layout.TRACKER}: {error}") from error
    if text == "release" or (text and not text.isdigit()):
        return None
    named = int(text) if text else None
    found = iterations(root)
    if named is not None and _is_legacy(folder_of(root, named)):
        return None
    gaps: dict[int, str] = {}
    for iteration in reversed(found):
        folder = folder_of(root, iteration)
        if _is_legacy(folder):
            continue
        missing = gap(folder)
        if missing is not None:
            gaps[iteration] = missing
            continue
        if iteration == named:
            return Choice(iteration, _broken(gaps, iteration))
        if named is None:
            said = "is empty" if text == "" else "is missing"
            return Choice(iteration, f"{layout.TRACKER} {said}", repair=True)
        if iteration > named:
            if _written(folder / LAST_FILE) >= _written(tracker):
                return Choice(
                    iteration,
                    f"{layout.TRACKER} still says {named}, and {folder.name} was complete",
                    repair=True,
                )
            continue  # the tracker was set back on purpose
        missing = gaps.get(named) or "it is not there"
        return Choice(iteration, f"{folder_of(root, named).name}: {missing}", repair=True)
    if named is not None:
        name, missing = folder_of(root, named).name, gaps.get(named)
        what = "is not there" if missing is None else f"is not complete ({missing})"
        raise UserError(
            f"{root}: {layout.TRACKER} names iteration {named}, but {name} {what}, nor is any other "
            "checkpoint there; give a folder that holds one"
        )
    if text == "":
        return Choice(None, f"{layout.TRACKER} is empty and no checkpoint is complete", repair=True)
    return Choice(None, _broken(gaps, None))


def iterations(root: Path) -> list[int]:
    """Return the iterations that have a folder, complete or not, in order."""
    names = (path.name.removeprefix("iter_") for path in root.glob("iter_*"))
    return sorted(int(name) for name in names if name.isdigit())


def repair(root: Path, choice: Choice) -> None:
    """Make the tracker say what was chosen, by a temporary name and a rename."""
    tracker = root / layout.TRACKER
    if choice.iteration is None:
        tracker.unlink(missing_ok=True)
        return
    write_atomically(tracker, str(choice.iteration))


def _broken(gaps: dict[int, str], chosen: int | None) -> str | None:
    later = [n for n in gaps if chosen is None or n > chosen]
    return f"iter_{max(later):07d}: {gaps[max(later)]}" if later else None


def _is_legacy(folder: Path) -> bool:
    return any(folder.glob("mp_rank_*"))


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns
