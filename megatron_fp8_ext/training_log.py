"""Read Megatron's own log lines: the record that every version prints and nobody has to switch on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

_ITERATION = re.compile(r"iteration\s+(\d+)/\s*(\d+) \|")
_VALIDATION = re.compile(
    r"validation loss at iteration (\d+) on validation set \| lm loss value: ([-+.\dEeinfa]+)"
)
_FIELD = re.compile(r"([A-Za-z][A-Za-z /()_-]*?):?\s*:\s*([-+.\dEeinfa]+) \|")
_THROUGHPUT = "throughput per GPU (TFLOP/s/GPU)"


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One logged iteration.

    Attributes:
        number: iteration, from 1.
        total: `--train-iters`.
        loss: LM loss, the mean of the interval; None where all of its steps were skipped. Megatron
            prints, as the second iteration's loss after any start, the mean of the first two.
        learning_rate: of this iteration.
        milliseconds: mean time of an iteration of the interval.
        grad_norm: global gradient norm; None where not printed.
        global_batch_size: samples of the iteration; None where not printed.
        teraflops: TFLOP/s for each GPU by Megatron's count (`--log-throughput`); None without.
    """

    number: int
    total: int
    loss: float | None
    learning_rate: float
    milliseconds: float
    grad_norm: float | None
    global_batch_size: int | None = None
    teraflops: float | None = None


def parse_line(line: str) -> Iteration | None:
    """Return the iteration a line logs, or None for any other line."""
    match = _ITERATION.search(line)
    if match is None:
        return None
    fields = {name.strip(): value for name, value in _FIELD.findall(line[match.end() :])}
    if "learning rate" not in fields:
        return None
    loss, norm = fields.get("lm loss"), fields.get("grad norm")
    batch, teraflops = fields.get("global batch size"), fields.get(_THROUGHPUT)
    return Iteration(
        number=int(match.group(1)),
        total=int(match.group(2)),
        loss=None if loss is None else float(loss),
        learning_rate=float(fields["learning rate"]),
        milliseconds=float(fields.get("elapsed time per iteration (ms)", "nan")),
        grad_norm=None if norm is None else float(norm),
        global_batch_size=None if batch is None else int(batch),
        teraflops=None if teraflops is None else float(teraflops),
    )


def validation_losses(lines: Iterable[str]) -> dict[int, float]:
    """Return the LM loss of each validation among `lines`, by iteration."""
    found = (_VALIDATION.search(line) for line in lines)
    return {int(match.group(1)): float(match.group(2)) for match in found if match}


def parse(lines: Iterable[str]) -> Iterator[Iteration]:
    """Yield the logged iterations among `lines`."""
    for line in lines:
        found = parse_line(line)
        if found is not None:
            yield found


def own_losses(iterations: Sequence[Iteration]) -> list[Iteration]:
    """Return the iterations of one process, logged one by one, with the second's own loss.

    Megatron prints the mean of the first two there; what is returned has lost about one digit.
    """
    out = list(iterations)
    if len(out) > 1 and out[0].loss is not None and out[1].loss is not None:
        out[1] = replace(out[1], loss=2 * out[1].loss - out[0].loss)
    return out
