"""The sbatch files, run by bash with stand-ins for Slurm's commands: what starts, and what is requeued."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_fp8_ext import presets
from megatron_fp8_ext.launch import plan, render, request

SCONTROL = '[ "$1" = show ] && echo node0 || echo "$@" >> requeued\n'
# Records each step; the training itself "saves" the iteration that the test wants.
SRUN = """echo "$@" >> started
case "$*" in *pretrain_gpt*) echo "$SAVES" > "$TRACKER" ;; *"job submit"*) exec /bin/sleep 30 ;; esac
"""


def sbatch(folder: Path, name: str, output: str) -> Path:
    inputs = {"data": "DATA", "model": "MODEL", "init": "STABLE/iter_0035000", "output": output}
    asked = request.Request(
        preset=presets.get(name), inputs=inputs, launcher="slurm", slime="SLIME"
    )
    (path, content), *_ = render.launch(plan.build(asked, plan.Facts())).files.items()
    file = folder / Path(path).name
    file.write_text(content)
    for command, text in (
        ("srun", SRUN),
        ("scontrol", SCONTROL),
        ("sleep", "exec /bin/sleep 0.1\n"),
    ):
        (folder / command).write_text(f"#!/usr/bin/env bash\n{text}")
        (folder / command).chmod(0o755)
    return file


def environment(folder: Path, tracker: Path, saves: str = "") -> dict[str, str]:
    return {
        "PATH": f"{folder}:{os.environ['PATH']}", "SAVES": saves, "TRACKER": str(tracker),
        "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node0", "SLURM_JOB_NUM_NODES": "1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "saves", "requeued"),
    [
        ("", "1000", True),
        ("1000", "2000", True),
        ("1000", "1000", False),
        ("39000", "40000", False),
    ],
)
def test_a_job_out_of_time_goes_on_as_long_as_it_makes_progress(tmp_path, before, saves, requeued):
    file = sbatch(tmp_path, "qwen2.5-7b-cpt-decay", str(tmp_path / "out"))
    tracker = tmp_path / "out" / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.parent.mkdir(parents=True)
    if before:
        tracker.write_text(before)
    env = environment(tmp_path, tracker, saves)
    done = subprocess.run(
        ["bash", str(file)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "requeued").is_file() is requeued
    preflight, training = (tmp_path / "started").read_text().splitlines()
    assert preflight.endswith("megatron-fp8 doctor --gpus 8")
    # The first start branches from the stable run, every later one continues its own.
    wanted = f"--load {tracker.parent}" if before else "--load STABLE --ckpt-step 35000"
    assert training.endswith(wanted) and "--rdzv-endpoint node0:29400" in training


@pytest.mark.parametrize("progress", [True, False])
def test_a_ray_job_is_requeued_on_slurms_signal(tmp_path, progress):
    file = sbatch(tmp_path, "qwen2.5-7b-rl-stage1", str(tmp_path / "out"))
    tracker = tmp_path / "out" / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.parent.mkdir(parents=True)
    process = subprocess.Popen(
        ["bash", str(file)],
        cwd=tmp_path,
        env=environment(tmp_path, tracker),
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while "job submit" not in (_text(tmp_path / "started")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        if progress:
            tracker.write_text("20")
        os.kill(process.pid, signal.SIGUSR1)
        if progress:
            while _text(tmp_path / "requeued") != "requeue 77\n":
                assert time.monotonic() < deadline
                time.sleep(0.05)
        else:
            time.sleep(0.5)
            assert not (tmp_path / "requeued").exists()
        assert process.poll() is None, "the signal alone ends nothing"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""
