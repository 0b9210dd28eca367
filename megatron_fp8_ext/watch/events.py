"""Read TensorBoard event files with TensorBoard's own reader, again and again while a run writes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.watch.readings import Readings

PATTERN = "events.out.tfevents.*"
# Tags that `status` reads; a long run logs ten times as many, which need not be kept.
TAGS = frozenset(
    (
        "lm loss", "lm loss validation", "learning-rate", "grad-norm", "batch-size", "iteration-time",
        "throughput", "train/loss", "train/lr-pg_0", "train/grad_norm", "perf/actor_train_tflops",
        "perf/actor_train_tok_per_s", "rollout/raw_reward",
    )
)  # fmt: skip
_TEXT = "/text_summary"  # what torch's writer appends to the tag of a text


class EventFolder:
    """The event files of one folder; `read` takes up what was written since the last time.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.backend.event_processing import event_file_loader
        except ImportError as error:
            raise UserError(
                f'{folder} holds TensorBoard files: pip install "megatron-fp8-ext[watch]" ({error})'
            ) from error
        self._loader = event_file_loader.LegacyEventFileLoader
        self._readers: dict[Path, Any] = {}
        self._seen: dict[Path, set[str]] = {}
        self.readings = Readings(folder)

    def read(self) -> Readings:
        """Return everything logged so far."""
        for file in sorted(self.readings.source.glob(PATTERN), key=lambda path: path.name):
            if file not in self._readers:
                self._readers[file] = self._loader(str(file))
            for event in self._load(file):
                self._take(file, event)
        return self.readings

    def _load(self, file: Path) -> Iterator[Any]:
        """The new events; one that is being written, or was cut off by a crash, waits."""
        try:
            yield from self._readers[file].Load()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}; mend its rights") from error

    def _take(self, file: Path, event: Any) -> None:
        found, seen = self.readings, self._seen.setdefault(file, set())
        for value in event.summary.value:
            if value.HasField("tensor") and value.tag.endswith(_TEXT):
                text = value.tensor.string_val
                found.arguments[value.tag.removesuffix(_TEXT)] = text[0].decode() if text else ""
            elif value.tag in TAGS and value.HasField("simple_value"):
                new = value.tag not in seen
                found.add(value.tag, event.step, value.simple_value, event.wall_time, new)
                seen.add(value.tag)
                found.updated = max(found.updated or 0.0, event.wall_time)
