"""kill -9 at random moments, and what the same command then does: the soak of the CPU and of the GPU tests.

A thread watches the checkpoint folder from outside and kills the whole process group: while the run
starts, inside a checkpoint write, or between two.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_fp8_ext import training_log
from megatron_fp8_ext.checkpoint import complete, layout
from megatron_fp8_ext.training_log import Iteration

KINDS = ("write", "between", "start")  # each once, then at random


@dataclass(frozen=True)
class Moment:
    """Some seconds after the start, or after the `count`-th write of a checkpoint began or ended."""

    kind: str
    count: int
    seconds: float

    def __str__(self) -> str:
        since = {
            "start": "its start",
            "write": f"checkpoint write {self.count} began",
            "between": f"checkpoint write {self.count} ended",
        }
        return f"{self.seconds:.3f} s after {since[self.kind]}"


@dataclass
class Watch:
    """Watches one process; kills it at `moment`. Times are seconds since it was started."""

    save: Path
    moment: Moment | None = None
    begins: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    def __call__(self, process: subprocess.Popen[str]) -> None:
        started = time.monotonic()
        folders, tracker = self._seen()
        while process.poll() is None:
            seconds = time.monotonic() - started
            now, named = self._seen()
            if now != folders and len(self.begins) == len(self.ends):
                self.begins.append(seconds)
            if named != tracker and len(self.begins) > len(self.ends):
                self.ends.append(seconds)
            folders, tracker = now, named
            if self._due(seconds):
                os.killpg(process.pid, signal.SIGKILL)
                return
            time.sleep(0.001)

    def _seen(self) -> tuple[dict[str, int], int]:
        """When each checkpoint's folder and the tracker last changed."""
        folders = {path.name: _changed(path) for path in self.save.glob("iter_*")}
        return folders, _changed(self.save / layout.TRACKER)

    def _due(self, seconds: float) -> bool:
        if self.moment is None:
            return False
        times = {"start": [0.0], "write": self.begins, "between": self.ends}[self.moment.kind]
        passed = len(times) >= self.moment.count
        return passed and seconds >= times[self.moment.count - 1] + self.moment.seconds


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


@dataclass(frozen=True)
class Rhythm:
    """Seconds that a run takes to its first checkpoint, for a write, and from one to the next."""

    start: float
    write: float
    between: float

    @classmethod
    def of(cls, watch: Watch) -> Rhythm:
        """The rhythm of an uninterrupted run."""
        writes = [b - a for a, b in zip(watch.begins, watch.ends, strict=True)]
        gaps = [b - a for a, b in zip(watch.ends, watch.begins[1:], strict=False)]
        return cls(watch.begins[0], statistics.median(writes), statistics.median(gaps))

    def moment(self, rng: random.Random, kind: str) -> Moment:
        """A random moment of that kind."""
        count = 1 if kind == "start" else rng.randint(1, 2)
        return Moment(kind, count, rng.uniform(0, getattr(self, kind)))


def soak(start: Callable, save: Path, rhythm: Rhythm, seed: int, kills: int) -> list:
    """Give one command again and again, `kills` times killed, and once more to its end.

    Args:
        start: runs the command with `kill=` a Watch; returns its outcome.
        save: its `--save`; a run that ends before it is killed starts over in an empty one.
        rhythm: of the uninterrupted run.
        seed: of the moments.
        kills: how often it is killed.

    Returns:
        The outcomes, in order. Each is checked to continue right after the last complete checkpoint.
    """
    rng = random.Random(seed)
    outcomes, killed = [], 0
    first, begins = None, None
    while True:
        moment = None
        if killed < kills:
            kind = KINDS[killed] if killed < len(KINDS) else rng.choice(KINDS)
            moment = rhythm.moment(rng, kind)
        outcome = start(kill=Watch(save, moment))
        outcomes.append(outcome)
        assert outcome.code in (0, -9), outcome.output[-4000:]
        numbers = [i.number for i in outcome.iterations]
        if numbers:
            first = first or numbers[0]  # a branch does not begin at 1
            assert numbers == list(range(begins or first, (begins or first) + len(numbers)))
        killed += outcome.code == -9
        logged = f"iterations {numbers[0]} to {numbers[-1]}" if numbers else "no iteration"
        print(f"{_ended(outcome, moment, killed)}; {logged} logged; left: {left(save)}")
        chosen = complete.choose(save) if save.is_dir() else None
        begins = chosen.iteration + 1 if chosen is not None and chosen.iteration else None
        if outcome.code == 0:
            if killed >= kills:
                return outcomes
            shutil.rmtree(save)
            begins = None


def _ended(outcome, moment: Moment | None, killed: int) -> str:
    return f"kill {killed}: {moment}" if outcome.code else "ran to its end"


def left(save: Path) -> str:
    """Say in what state a checkpoint folder is."""
    if not save.is_dir():
        return "no folder"
    tracker = save / layout.TRACKER
    named = f"names {tracker.read_text().strip() or 'nothing'}" if tracker.exists() else "not there"
    found = complete.iterations(save)
    if not found:
        return f"no checkpoint, tracker {named}"
    newest = complete.folder_of(save, found[-1])
    return f"{newest.name} {complete.gap(newest) or 'complete'}, tracker {named}"


def differences(outcomes: list, whole: list[Iteration]) -> dict[int, float]:
    """Largest relative difference of each iteration's loss to an uninterrupted run's.

    Learning rates must be the same to the last printed digit. What Megatron prints as the second loss
    after a start is the mean of the first two: a run's second is compared with the other's mean, and the
    digits that the mean hides (1e-6) are no difference.
    """
    wanted = {i.number: i for i in whole}
    second = whole[1].number
    alone = {i.number: i.loss for i in training_log.own_losses(whole)}
    found: dict[int, float] = {}
    for outcome in outcomes:
        for position, iteration in enumerate(outcome.iterations):
            number = iteration.number
            assert iteration.learning_rate == wanted[number].learning_rate, iteration
            mean, as_whole = position == 1, (position == 1) == (number == second)
            if as_whole:
                theirs, hidden = wanted[number].loss, 0.0
            else:
                theirs, hidden = alone[number], 1e-6
                if mean:
                    theirs = (alone[number - 1] + theirs) / 2
            difference = max(abs(iteration.loss - theirs) / theirs - hidden, 0.0)
            found[number] = max(found.get(number, 0.0), difference)
    return found


def resumes_within_the_noise(start: Callable, folder: Path, seed: int, kills: int) -> None:
    """Measure the noise of two uninterrupted runs, then kill a third; its losses stay within.

    Args:
        start: runs the command with the `--save` it is given, and `kill=`.
        folder: an empty one.
        seed: of the moments.
        kills: how many.
    """
    watch = Watch(folder / "first")
    first = start(folder / "first", kill=watch)
    second = start(folder / "second", kill=None)
    assert first.code == second.code == 0, (first.output + second.output)[-4000:]
    noise = max(differences([second], first.iterations).values())
    print(f"noise: two uninterrupted runs differ by at most {noise:.2e} of the loss")
    save, rhythm = folder / "killed", Rhythm.of(watch)
    outcomes = soak(lambda kill: start(save, kill=kill), save, rhythm, seed, kills)
    assert sum(outcome.code == -9 for outcome in outcomes) == kills
    found = differences(outcomes, first.iterations)
    assert set(found) == {i.number for i in first.iterations}
    worst = max(found.values())
    print(f"{kills} kills: the losses differ by at most {worst:.2e} from the first run's")
    # Each of the three lies up to half of that away from their middle.
    assert worst <= 2 * noise
