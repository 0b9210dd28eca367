"""Read a run's log where it has no event files: what Megatron prints says the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_fp8_ext import training_log
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.proof.record import VERSIONS
from megatron_fp8_ext.watch.readings import Readings

PATTERNS = ("*.log", "log.txt", "*.out")
_ARGUMENT = re.compile(r"^  (\w+) \.{3,} ?(.*)$")
_START = "arguments ----"


class LogFile:
    """One log; `read` takes up what was written since the last time."""

    def __init__(self, file: Path) -> None:
        self._offset, self._rest, self._seen = 0, "", set[str]()
        self.readings = Readings(file)

    def read(self) -> Readings:
        """Return everything logged so far.

        Raises:
            UserError: the log cannot be read.
        """
        file = self.readings.source
        try:
            with file.open("rb") as opened:
                opened.seek(self._offset)
                new = opened.read()
                self._offset += len(new)
            self.readings.updated = file.stat().st_mtime
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}; mend its rights") from error
        *lines, self._rest = (self._rest + new.decode("utf-8", "replace")).split("\n")
        for line in lines:
            self._take(line)
        return self.readings

    def _take(self, line: str) -> None:
        if _START in line:
            self._seen.clear()
        elif (argument := _ARGUMENT.match(line)) is not None:
            self.readings.arguments[argument.group(1)] = argument.group(2)
        elif line.startswith(VERSIONS):
            try:
                device = str(json.loads(line[len(VERSIONS) :]).get("device", ""))
            except ValueError:  # cut off by a crash
                return
            self.readings.arguments["fp8_ext_device"] = device
        elif (found := training_log.parse_line(line)) is not None:
            self.readings.arguments["train_iters"] = str(found.total)
            for tag, value in (
                ("lm loss", found.loss),
                ("learning-rate", found.learning_rate),
                ("grad-norm", found.grad_norm),
                ("batch-size", found.global_batch_size),
                ("iteration-time", found.milliseconds / 1000),
                ("throughput", found.teraflops),
            ):
                if value is not None:
                    self._add(tag, found.number, value)
        else:
            for number, loss in training_log.validation_losses([line]).items():
                self._add("lm loss validation", number, loss)

    def _add(self, tag: str, step: int, value: float) -> None:
        self.readings.add(tag, step, value, None, tag not in self._seen)
        self._seen.add(tag)
