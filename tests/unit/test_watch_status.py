"""The figures of `watch` from readings: slime's tags, devices, resumes, what is missing."""

from __future__ import annotations

import json
import math
import struct

import pytest

from megatron_fp8_ext.watch import find, screen
from megatron_fp8_ext.watch.readings import Readings
from megatron_fp8_ext.watch.status import status


def readings(tmp_path, tags, arguments, steps=range(10), seconds=2.0):
    found = Readings(tmp_path, arguments=dict(arguments))
    for step in steps:
        for tag, value in tags.items():
            found.add(tag, step, value, 1000.0 + seconds * step, step == steps[0])
    found.updated = 1000.0 + seconds * steps[-1]
    return found


def test_a_slime_run(tmp_path):
    tags = {
        "train/loss": 0.5, "train/lr-pg_0": 1e-6, "train/grad_norm": 0.1, "rollout/raw_reward": 0.25,
        "perf/actor_train_tflops": 494.5, "perf/actor_train_tok_per_s": 1e5,
    }  # fmt: skip
    arguments = {
        "num_rollout": "100", "rollout_batch_size": "128", "n_samples_per_prompt": "16",
        "global_batch_size": "1024", "world_size": "32", "fp8_ext_device": "NVIDIA H100 80GB HBM3",
    }  # fmt: skip
    now = status(readings(tmp_path, tags, arguments))
    assert (now.total, now.iteration) == (200, 9) and not now.finished
    assert now.mfu == pytest.approx(0.5) and now.tokens_per_second == 1e5
    assert now.eta == pytest.approx(191 * 2.0) and now.reward == 0.25 and now.notes == ()
    assert "MFU 50.0% | ETA 0:06:22" in screen.line(now)


def test_time_between_iterations_counts_validations_but_not_the_queue(tmp_path):
    found = readings(tmp_path, {"lm loss": 1.0, "learning-rate": 1e-4}, {"train_iters": "20"})
    for step in range(5, 10):  # requeued an hour later, from the checkpoint of step 4
        for tag in ("lm loss", "learning-rate"):
            found.add(tag, step, 1.0, 5000.0 + 4.0 * step, step == 5)
    now = status(found)
    assert now.seconds == pytest.approx(4.0) and now.eta == pytest.approx(11 * 4.0)
    assert list(now.losses) == list(range(10))


def test_packed_samples_have_no_tokens_per_second(tmp_path):
    arguments = {"sft_data": "data", "seq_length": "128", "fp8_ext_device": "NVIDIA H200"}
    tags = {"lm loss": 1.0, "batch-size": 4.0, "iteration-time": 1.0, "throughput": 100.0}
    now = status(readings(tmp_path, tags, arguments))
    assert now.tokens_per_second is None and now.mfu is None and "packs differ" in now.notes[0]


def test_what_is_missing_says_so(tmp_path):
    assert status(Readings(tmp_path)) is None
    now = status(readings(tmp_path, {"lm loss": 1.0}, {}))
    assert [note.split(":")[0] for note in now.notes] == ["tokens/s", "MFU"]
    assert screen.duration(now.eta) == "-" and now.total is None


def test_a_curve_is_short_and_bears_what_is_not_a_number():
    text = screen.curve({step: 10.0 - step / 100 for step in range(1000)} | {1000: math.nan})
    bars, _, span = text.partition(" ")
    assert len(bars) == 60 and bars[0] == "█" and bars[-1] == "▁" and span.endswith("to 9.92")
    assert screen.curve({1: 1.0, 3: 2.0}).startswith("▁▁█ ")  # --log-interval 2
    assert screen.curve({1: 2.0, 2: 1.0}).startswith("█▁ ") and screen.curve({1: math.inf}) == ""


def test_the_newest_run_is_shown_and_the_others_named(tmp_path):
    import os

    for age, name in enumerate(("new", "old")):
        folder = tmp_path / name / "tensorboard"
        folder.mkdir(parents=True)
        file = folder / "events.out.tfevents.1.host"
        file.write_bytes(struct.pack("<QI", 0, 0) + bytes(4))
        os.utime(file, (1000 - age, 1000 - age))
    (tmp_path / "new" / "run.json").write_text(
        json.dumps({"preset": "mine", "world_size": 8, "flags": ["--seq-length", "512", "--bf16"]})
    )
    pytest.importorskip("tensorboard")
    found = find.find(tmp_path)
    assert found.name == "mine" and found.others == (tmp_path / "old" / "tensorboard",)
    assert found.source.readings.arguments == {"seq_length": "512", "world_size": "8"}
