"""Run the members of a comparison, one after the other or one on each group of GPUs.

A member's folder holds `member.json` (what it is), `log.txt` (every attempt, appended) and `state.json`
(how it ended). A finished member is never run again; a crashed or interrupted one is, from its last
checkpoint where it writes any.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.files import write_atomically
from megatron_fp8_ext.megatron_plugin import flags
from megatron_fp8_ext.proof import child, fingerprint, record
from megatron_fp8_ext.proof.plan import Member
from megatron_fp8_ext.recipe import TE_FP32_SCALES

ATTEMPT = "$ "  # a line of the log that begins so is the command of an attempt


def execute(
    members: Sequence[Member],
    console: Console,
    parallel: int | None = None,
    score: str | None = None,
) -> None:
    """Run every member that has not finished.

    Args:
        members: from `plan.plan`.
        console: for progress.
        parallel: how many at once; None for one on each group of GPUs that a member needs. More than
            that share GPUs.
        score: command run after each finished run, with {checkpoints}, {folder}, {recipe} and {seed}
            filled in; the last line it prints is a JSON object of numbers. Where it fails, the run's
            last words say so, and the next call scores it again.

    Raises:
        UserError: a folder holds another comparison.
        KeyboardInterrupt: after the running members were stopped and marked interrupted.
    """
    data = fingerprint.of_inputs(members[0].common) if members else {}
    for member in members:
        _claim(member, data)
    left = [member for member in members if not _done(member, score)]
    if len(left) < len(members):
        console.print(f"{len(members) - len(left)} of {len(members)} runs had finished before")
    needed = _processes(members[0].common) if members else 1
    found = places(needed, _visible_gpus(), parallel)
    while left:
        _execute_at_once(left, console, score, found)
        if found.sharing == 1:
            return
        # Sharing a GPU is only a way to be quicker: what did not fit beside others has not failed.
        left = [member for member in left if _ran_out_of_memory(member)]
        if left:
            found = places(needed, _visible_gpus(), max(len(found.devices) // 2, 1))
            console.print(
                f"{len(left)} runs ran out of memory beside others: again, {len(found.devices)} at a time"
            )


def _execute_at_once(
    left: Sequence[Member], console: Console, score: str | None, found: Places
) -> None:
    """Run each once, as many at a time as there are places."""
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for device in found.devices:
        free.put(device)
    stop = threading.Event()
    with (
        _termination_is_an_interrupt(),
        child.progress(console) as bar,
        ThreadPoolExecutor(len(found.devices)) as pool,
    ):
        attempt = functools.partial(
            _run, free=free, stop=stop, bar=bar, score=score, sharing=found.sharing
        )
        futures = [pool.submit(attempt, member) for member in left]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()  # each worker ends its own child
            raise


def _ran_out_of_memory(member: Member) -> bool:
    state = record.state(member.folder)
    return state.get("status") == "crashed" and "out of memory" in state["last_words"]


def _claim(member: Member, data: dict[str, Any]) -> None:
    """Write what the member is, or check that its folder holds the same one."""
    member.folder.mkdir(parents=True, exist_ok=True)
    described = {
        "recipe": member.choice.label,
        "is_fp8": member.choice.is_fp8,
        "control": member.choice.control,
        "seed": member.seed,
        "steps": member.steps,
        "common": list(member.common),
        "argv": list(member.argv),
        "data": data,
    }
    file = member.folder / record.MEMBER
    if file.is_file():
        difference = record.first_difference(json.loads(file.read_text()), described)
        if difference is not None:
            raise UserError(
                f"{member.folder} holds another run: {difference}; give another --output, or delete it"
            )
        return
    write_atomically(file, json.dumps(described, indent=1))


@dataclass(frozen=True)
class Places:
    """Where runs go.

    Attributes:
        devices: a value of CUDA_VISIBLE_DEVICES for each run at a time; None leaves it alone.
        sharing: how many runs share a device (or the CPU) at most.
    """

    devices: tuple[str | None, ...]
    sharing: int


def places(needed: int, gpus: Sequence[str], parallel: int | None) -> Places:
    """Return where the runs go; several of one device each may share it, one after the other else.

    Args:
        needed: processes of a run.
        gpus: visible devices.
        parallel: runs at a time; None for as many as there are groups of devices.

    Raises:
        UserError: `parallel` is no count, or runs of several processes would share GPUs.
    """
    groups = max(len(gpus) // needed, 1)
    parallel = groups if parallel is None else parallel
    if parallel < 1:
        raise UserError(f"--parallel {parallel}: at least 1")
    sharing = -(-parallel // groups)
    if sharing > 1 and needed > 1 and gpus:
        raise UserError(
            f"--parallel {parallel} runs of {needed} processes need {parallel * needed} GPUs; "
            f"{len(gpus)} are visible (only runs of one process can share one)"
        )
    if len(gpus) < needed or len(gpus) <= 1 or parallel == 1:
        return Places((None,) * parallel, sharing)
    own = [",".join(gpus[i * needed : (i + 1) * needed]) for i in range(groups)]
    return Places(tuple(own[i % groups] for i in range(parallel)), sharing)


def _visible_gpus() -> list[str]:
    written = os.environ.get("CUDA_VISIBLE_DEVICES")
    if written is not None:
        return [name for name in written.split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(i) for i, line in enumerate(done.stdout.splitlines()) if line.startswith("GPU ")]


def _launcher(command: Sequence[str]) -> int | None:
    """Index of torchrun, or of the module of the same, in the command."""
    for index, word in enumerate(command):
        if Path(word).name == "torchrun" or word == "torch.distributed.run":
            return index
    return None


def _processes(command: Sequence[str]) -> int:
    """Processes of one run on this machine."""
    at = _launcher(command)
    if at is None:
        return 1
    for flag in ("--nproc-per-node", "--nproc_per_node"):
        for index, word in enumerate(command[at:], at):
            value = word.partition("=")[2] if word.startswith(flag + "=") else None
            if word == flag:
                value = command[index + 1]
            if value is not None and value.isdigit():
                return int(value)
    return 1


def _with_free_port(argv: Sequence[str]) -> list[str]:
    """Give torchrun a port of its own, unless the command says where to meet."""
    at = _launcher(argv)
    if at is None or any(w.startswith(("--master", "--rdzv", "--standalone")) for w in argv):
        return list(argv)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [*argv[: at + 1], f"--master-port={port}", *argv[at + 1 :]]


def _done(member: Member, score: str | None) -> bool:
    scored = score is None or (member.folder / record.SCORES).is_file()
    return record.status(member.folder) == "finished" and scored


def _run(
    member: Member,
    free: queue.SimpleQueue[str | None],
    stop: threading.Event,
    bar: Progress,
    score: str | None,
    sharing: int,
) -> None:
    if stop.is_set():
        return
    place = free.get()
    try:
        if record.status(member.folder) != "finished":
            _attempt(member, place, stop, bar, sharing)
        if score is not None and record.status(member.folder) == "finished":
            try:
                _score(member, place, score, stop)
            except UserError as error:  # shown with the run; the others go on
                bar.console.print(f"[red]{member.name}[/]: {error}", soft_wrap=True)
                state = record.state(member.folder)
                _write_state(member, **{**state, "last_words": str(error)})
    finally:
        free.put(place)


def _attempt(
    member: Member, place: str | None, stop: threading.Event, bar: Progress, sharing: int
) -> None:
    tracker = member.checkpoints / "latest_checkpointed_iteration.txt"
    argv = _with_free_port(member.resumed() if tracker.is_file() else member.argv)
    log = member.folder / "log.txt"
    task = bar.add_task(member.name, total=member.steps, note="starting")
    start, last = time.monotonic(), 0
    _write_state(member, status="running")
    with log.open("a") as file:
        file.write(f"{ATTEMPT}{shlex.join(argv)}\n")
        file.flush()
        try:
            process = subprocess.Popen(
                argv,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=_environment(place),
                start_new_session=True,
            )
        except OSError as error:
            file.write(f"{error}\n")
            _write_state(member, status="crashed", last_words=str(error))
            bar.update(task, note=f"[red]crashed[/]: {error}")
            return
        watcher = threading.Thread(target=_end_on, args=(stop, process), daemon=True)
        watcher.start()
        for iteration in child.follow(process, file, bar, task):
            last = iteration.number
        # wait4 knows the largest resident set among the member's processes.
        _, waited, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(waited)
    code = process.returncode
    if code == 0 and last == member.steps:
        status, words = "finished", ""
    elif stop.is_set():
        status, words = "interrupted", f"stopped by the user after iteration {last}"
    else:
        status, words = "crashed", child.last_words(_last_attempt(log)) or f"exit code {code}"
    _write_state(
        member,
        status=status,
        exit_code=code,
        last_iteration=last,
        seconds=round(time.monotonic() - start, 1),
        peak_resident_mb=round(usage.ru_maxrss / 1024),
        sharing=sharing,
        last_words=words,
    )
    if status != "finished":
        bar.update(task, note=f"[red]{status}[/]: {words[:90]}")


def _score(member: Member, place: str | None, command: str, stop: threading.Event) -> None:
    """Run the score command and keep what it measured; nothing where it was stopped.

    Raises:
        UserError: it failed, or its last line is no JSON object of numbers.
    """
    places = {
        "{checkpoints}": str(member.checkpoints),
        "{folder}": str(member.folder),
        "{recipe}": member.choice.label,
        "{seed}": str(member.seed),
    }
    words = shlex.split(command)
    for name, value in places.items():
        words = [word.replace(name, value) for word in words]
    try:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            env=_environment(place), start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--score: {error}") from error
    threading.Thread(target=_end_on, args=(stop, process), daemon=True).start()
    printed, complained = process.communicate()
    (member.folder / "score.txt").write_text(printed + complained)
    if stop.is_set():
        return
    lines = printed.strip().splitlines()
    try:
        found: Any = json.loads(lines[-1]) if process.returncode == 0 and lines else None
        scores = {str(name): float(value) for name, value in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--score of {member.name} ended with exit code {process.returncode} and no JSON object of "
            f"numbers in its last line; its output is {member.folder / 'score.txt'}"
        ) from error
    write_atomically(member.folder / record.SCORES, json.dumps(scores))
    state = record.state(member.folder)
    if state.get("last_words"):  # of an earlier try
        _write_state(member, **{**state, "last_words": ""})


def _write_state(member: Member, **state: Any) -> None:
    write_atomically(member.folder / record.STATE, json.dumps(state))


def _environment(place: str | None) -> dict[str, str]:
    """The environment, without what another run's recipe may have left in it."""
    pinned = (flags.RECIPE_VARIABLE, TE_FP32_SCALES)
    env = {name: value for name, value in os.environ.items() if name not in pinned}
    env["PYTHONUNBUFFERED"] = "1"
    if place is not None:
        env["CUDA_VISIBLE_DEVICES"] = place
    return env


def _end_on(stop: threading.Event, process: subprocess.Popen[str]) -> None:
    """End the process and its children when `stop` is set; return when it has ended by itself."""
    while not stop.wait(0.5):
        if process.returncode is not None:
            return
    for sent, patience in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 0.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        deadline = time.monotonic() + patience
        while process.returncode is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if process.returncode is not None:
            return


@contextlib.contextmanager
def _termination_is_an_interrupt() -> Iterator[None]:
    """SIGTERM (a scheduler's time limit) stops the members as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, outer)


def _last_attempt(log: Path) -> str:
    """What the last attempt printed, without its command."""
    text = f"\n{log.read_text(errors='replace')}".rpartition(f"\n{ATTEMPT}")[2]
    return text.partition("\n")[2]
