"""Read TensorBoard event files again and again while a run writes them.

The messages are decoded by TensorBoard's own classes. Its file reader computes every checksum in Python
(100,000 events: 9.6 s, tensorboard 2.21.0); here the frames are cut by their lengths alone, and events that
nobody asks for are not decoded (0.9 s).
"""

from __future__ import annotations

import re
import struct
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


_WANTED = re.compile(b"|".join(re.escape(tag.encode()) for tag in (*sorted(TAGS), _TEXT)))
_HEAD, _TAIL = 12, 4  # a length in 8 bytes and its checksum; the checksum of the message


class EventFolder:
    """The event files of one folder; `read` takes up what was written since the last time.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from google.protobuf.message import DecodeError
            from tensorboard.compat.proto import event_pb2
        except ImportError as error:
            raise UserError(
                f'{folder} holds TensorBoard files: pip install "megatron-fp8-ext[watch]" ({error})'
            ) from error
        self._event, self._damaged = event_pb2.Event, DecodeError
        self._offsets: dict[Path, int] = {}
        self._seen: dict[Path, set[str]] = {}
        self.readings = Readings(folder)

    def read(self) -> Readings:
        """Return everything logged so far.

        Raises:
            UserError: a file cannot be read, or is no event file.
        """
        for file in sorted(self.readings.source.glob(PATTERN), key=lambda path: path.name):
            for frame in self._frames(file):
                if _WANTED.search(frame) is None:
                    continue
                try:
                    event = self._event.FromString(frame)
                except self._damaged as error:
                    raise UserError(f"{file} is damaged: {error}; move it away") from error
                self._take(file, event)
        return self.readings

    def _frames(self, file: Path) -> Iterator[bytes]:
        """The new messages; one that is being written, or was cut off by a crash, waits."""
        start = self._offsets.get(file, 0)
        try:
            with file.open("rb") as opened:
                opened.seek(start)
                data = opened.read()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}; mend its rights") from error
        at = 0
        while at + _HEAD <= len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            end = at + _HEAD + length + _TAIL
            if end > len(data):
                break
            yield data[at + _HEAD : end - _TAIL]
            at = end
            self._offsets[file] = start + at

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
