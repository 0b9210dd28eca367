"""The whole loop on the CPU: real slime, Ray and Megatron, rollouts over HTTP with the pushed FP8 weights.

Minutes each. The SFT checkpoint is made once (RL_LOOP_SFT names a ready one); figures are in docs/rl.md.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trees
from rl_loop import faults, loop

from megatron_fp8_ext.checkpoint import complete
from megatron_fp8_ext.slime_plugin import checkout

pytestmark = [pytest.mark.slime, pytest.mark.slow, pytest.mark.timeout(3600)]
NEEDED = (
    "torch",
    "megatron",
    "ray",
    "transformers",
    "sglang",
    "sglang_router",
    "torch_memory_saver",
    "psutil",
)
LIMIT = 0.1
SHORT = {"rollouts": 3, "eval_interval": 10, "save_interval": 1}


def v03() -> Path:
    for tree in trees.found():
        if "update_weight_transport" in (tree / "slime" / "utils" / "arguments.py").read_text():
            assert checkout.read(tree, "").per_step_batch
            return tree
    pytest.skip("needs a checkout of slime v0.3 in SLIME_PATH")


@pytest.fixture(scope="module")
def slime() -> Path:
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"the loop needs {name}")
    return v03()


@pytest.fixture(scope="module")
def sft(tmp_path_factory) -> Path:
    """A checkpoint that solves about a third of the held-out sums."""
    ready = os.environ.get("RL_LOOP_SFT")
    if ready:
        return Path(ready)
    from rl_loop import sft as start

    folder = tmp_path_factory.mktemp("sft") / "model"
    assert 0.2 <= start.train(folder, stop_at=0.35) <= 0.6
    return folder


def run(slime, sft, tmp_path, **named) -> loop.Outcome:
    return loop.run(loop.Settings(sft=sft, **named), tmp_path, slime)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_reward_on_held_out_problems_rises(slime, sft, tmp_path, seed):
    outcome = run(slime, sft, tmp_path, seed=seed)
    assert outcome.code == 0, outcome.log[-3000:]
    before, after, error = loop.gain(outcome)
    assert 0.2 <= before <= 0.6
    assert after - before > 2 * error
    assert len(outcome.differences) == 60
    assert max(mean for _, mean, _ in outcome.differences.values()) < LIMIT


def test_reward_stays_with_a_learning_rate_of_zero(slime, sft, tmp_path):
    outcome = run(slime, sft, tmp_path, lr=0.0)
    assert outcome.code == 0, outcome.log[-3000:]
    before, after, error = loop.gain(outcome)
    assert abs(after - before) <= 2 * error


@pytest.mark.parametrize("fault", ["ignore-push", "corrupt-push"])
def test_a_push_that_does_not_arrive_stops_the_first_step(slime, sft, tmp_path, fault):
    outcome = run(slime, sft, tmp_path, fault=fault, rollouts=2, eval_interval=10)
    assert outcome.code == 2, outcome.log[-3000:]
    last = [x for x in outcome.log.splitlines() if "error:" in x][-1]
    assert "rollout 0: train and rollout log-probabilities differ by" in last
    assert list(outcome.differences) == [0]


def test_matched_scales_differ_less_than_mixed(slime, sft, tmp_path):
    means = {}
    for served, extra in (("fp32", ()), ("e8m0", ("--allow-mixed-rollout",))):
        folder = tmp_path / served
        outcome = run(slime, sft, folder, served=served, rollouts=1, eval_interval=10, extra=extra)
        assert outcome.code == 0, outcome.log[-3000:]
        means[served] = outcome.differences[0]
    assert means["fp32"][1] < means["e8m0"][1]


@pytest.mark.parametrize(
    ("fault", "says"), [("die", "does not answer"), ("hang", "generates nothing")]
)
def test_a_lost_rollout_server_stops_the_loop_and_it_resumes(slime, sft, tmp_path, fault, says):
    short = {**SHORT, "extra": ("--rollout-patience", "20")}
    stops(run(slime, sft, tmp_path, fault=fault, after=1, **short), tmp_path, says)
    goes_on(run(slime, sft, tmp_path, **short))


def test_a_train_actor_killed_inside_a_step_stops_the_loop_and_it_resumes(slime, sft, tmp_path):
    hook = ("--custom-megatron-before-train-step-hook-path", "rl_loop.faults.kill_in_step")
    broken = run(slime, sft, tmp_path, extra=hook, **SHORT)
    assert (tmp_path / faults.MARK).exists()
    stops(broken, tmp_path, "an actor died in the middle of its work")
    goes_on(run(slime, sft, tmp_path, extra=hook, **SHORT))


def test_a_disk_that_is_full_at_a_checkpoint_stops_the_loop_and_it_resumes(slime, sft, tmp_path):
    saved = tmp_path / "checkpoints"
    with faults.disk(saved, 26 << 20) as disk:  # a checkpoint has 17 MB
        if disk is None:
            pytest.skip("needs a mount namespace (unshare --user --mount)")
        settings = loop.Settings(sft=sft, **SHORT)
        broken = loop.run(settings, tmp_path, slime, enter=disk.enter)
        stops(broken, tmp_path, f"no space left for {saved}: make room")
        assert complete.gap(complete.folder_of(disk.seen, 0)) is None
        assert complete.gap(complete.folder_of(disk.seen, 1)) is not None
        disk.grow(100 << 20)
        goes_on(loop.run(settings, tmp_path, slime, enter=disk.enter))
        assert complete.gap(complete.folder_of(disk.seen, 2)) is None


def stops(broken: loop.Outcome, out: Path, says: str) -> None:
    """After rollout 0 in one line that says how to go on, and nothing of it goes on running."""
    assert broken.code == 2, broken.log[-3000:]
    error = [x for x in broken.log.splitlines() if "error:" in x][-1]
    print(error)
    assert says in error and "goes on after rollout 0" in error
    assert not faults.left_running(out)


def goes_on(again: loop.Outcome) -> None:
    assert again.code == 0, again.log[-3000:]
    assert sorted(again.differences) == [1, 2]


def test_a_second_stage_goes_on_from_the_first_and_is_converted(slime, sft, tmp_path):
    """Two stages as docs/pipeline.md has them: checkpoint to checkpoint, then Hugging Face and FP8."""
    first = run(slime, sft, tmp_path / "one", rollouts=2, eval_interval=10, save_interval=1)
    assert first.code == 0, first.log[-3000:]
    saved = tmp_path / "one" / "checkpoints"
    shutil.copytree(tmp_path / "one" / "served", tmp_path / "two" / "served")
    second = run(slime, saved, tmp_path / "two", rollouts=1, eval_interval=10)
    assert second.code == 0, second.log[-3000:]
    assert second.differences[0][1] < LIMIT, (
        "served with the first stage's weights, not its start's"
    )
    final, fp8 = tmp_path / "final", tmp_path / "final-fp8"
    for words in (
        ("megatron-to-hf", saved, final, "--hf-reference", sft),
        ("hf-to-fp8", final, fp8, "--scale-format", "fp32", "--device", "cpu"),
        ("verify", final, fp8),
    ):
        argv = [sys.executable, "-W", "ignore", "-m", "megatron_fp8_ext.cli", "convert"]
        done = subprocess.run([*argv, *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
