"""Run one training command of a demo in sight, and insist that it finishes; run other steps quietly."""

from __future__ import annotations

import contextlib
import io
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.proof import child
from megatron_fp8_ext.training_log import Iteration


def follow(
    name: str, argv: Sequence[str], log: Path, span: tuple[int, int], console: Console
) -> list[Iteration]:
    """Run a training command, show its progress, and return its iterations.

    Args:
        name: what the progress bar calls it.
        argv: the command.
        log: where its output goes.
        span: iteration it continues from, and its last one.
        console: where the bar is drawn.

    Raises:
        UserError: it stopped early; its last words and its log are named.
    """
    first, last = span
    with child.progress(console) as bar, log.open("w") as file:
        task = bar.add_task(name, total=last - first, note="starting")
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        file.write(f"$ {' '.join(argv)}\n")
        found = list(child.follow(process, file, bar, task, first))
        code = process.wait()
    if code != 0 or len(found) != last - first:
        raise UserError(
            f"the {name} run stopped with exit code {code} after {len(found)} of {last - first} "
            f"iterations: {child.last_words(log.read_text())}; the whole log is {log}"
        )
    return found


@contextlib.contextmanager
def quiet(console: Console, what: str) -> Iterator[None]:
    """Show what is being done, and keep from the terminal what others write there.

    Megatron warns of what it does not find on a CPU, transformers draws bars of its own.
    """
    with console.status(what), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(io.StringIO()):
            yield
