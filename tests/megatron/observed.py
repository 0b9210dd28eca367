"""The entry script, watched: which samples it consumes, and killed (-9) where the test says.

SAMPLES_LOG=FILE    one JSON line for each sample: corpus, sample number, documents, offsets
KILL_AT=N:WHEN      the N-th write into --save: `before` it, `torn` in its middle, or `after` it
KILL_BEFORE_STEP=N  when iteration N is about to begin
"""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
import sys

from megatron_fp8_ext.megatron_plugin import import_hook
from megatron_fp8_ext.megatron_plugin.pretrain_gpt import main


def die() -> None:
    """Kill this process with its checkpoint writer's helpers, which would outlive it."""
    sys.stdout.flush()
    os.killpg(os.getpgrp(), signal.SIGKILL)


def log_samples(path: str) -> None:
    def wrap(module):
        original = module.GPTDataset._query_document_sample_shuffle_indices

        def query(self, index):
            sample = int(self.shuffle_index[index])
            (first, begin), (last, end) = (self.sample_index[sample + i].tolist() for i in (0, 1))
            row = {
                "split": self.index_split.name,
                "corpus": os.path.basename(self.dataset_path),
                "sample": sample,
                "documents": self.document_index[first : last + 1].tolist(),
                "span": [begin, end],
            }
            with builtins.open(f"{path}.{os.environ.get('RANK', '0')}", "a") as file:
                file.write(json.dumps(row) + "\n")
            return original(self, index)

        module.GPTDataset._query_document_sample_shuffle_indices = query

    import_hook.after_import("megatron.core.datasets.gpt_dataset", wrap)


class Torn:
    """A file whose first write puts down half of it and kills the process."""

    def __init__(self, file):
        self._file = file

    def write(self, data):
        half = data[: len(data) // 2]
        self._file.write(half)
        self._file.flush()
        die()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


def kill_at(count: int, when: str) -> None:
    save = os.path.abspath(sys.argv[sys.argv.index("--save") + 1])
    seen = 0
    due = False

    def event(path) -> bool:
        nonlocal seen, due
        if due:
            die()  # the one before was to be finished, and is
        if not str(path).startswith(save + os.sep):
            return False
        seen += 1
        if seen < count:
            return False
        if when == "before":
            die()
        due = True
        return when == "torn"

    def wrap_open(original):
        def opened(file, mode="r", *args, **kwargs):
            if isinstance(file, int) or not any(flag in mode for flag in "wax"):
                return original(file, mode, *args, **kwargs)
            torn = event(os.path.abspath(file))
            handle = original(file, mode, *args, **kwargs)
            return Torn(handle) if torn else handle

        return opened

    def wrap_rename(original):
        def renamed(source, target, **kwargs):
            torn = event(os.path.abspath(target))
            if torn:
                die()  # a rename is done or not done
            return original(source, target, **kwargs)

        return renamed

    builtins.open = io.open = wrap_open(builtins.open)
    for name in ("rename", "replace"):
        setattr(os, name, wrap_rename(getattr(os, name)))


def kill_before_step(step: int) -> None:
    def wrap(module):
        original = module.train_step
        done = 0

        def train_step(*args, **kwargs):
            nonlocal done
            from megatron.training import get_args

            done = done or get_args().iteration
            done += 1
            if done == step:
                die()
            return original(*args, **kwargs)

        module.train_step = train_step

    import_hook.after_import("megatron.training.training", wrap)


if __name__ == "__main__":  # the checkpoint writer is spawned, and imports this file
    import_hook.install()
    if os.environ.get("SAMPLES_LOG"):
        log_samples(os.environ["SAMPLES_LOG"])
    if os.environ.get("KILL_AT"):
        number, how = os.environ["KILL_AT"].split(":")
        kill_at(int(number), how)
    if os.environ.get("KILL_BEFORE_STEP"):
        kill_before_step(int(os.environ["KILL_BEFORE_STEP"]))
    main()
