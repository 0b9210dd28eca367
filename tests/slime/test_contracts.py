"""slime v0.3's own plugin contract tests with our paths, and the seam of the mismatch at both commits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import trees

from megatron_fp8_ext.slime_plugin import checkout

pytestmark = pytest.mark.slime


@pytest.mark.parametrize("tree", trees.params())
def test_slimes_plugin_contracts_accept_our_filter(tree):
    contracts = tree / "tests" / "plugin_contracts"
    if not contracts.is_dir():
        pytest.skip("this slime has no plugin contracts")
    filter_path = "megatron_fp8_ext.slime_plugin.reward_varies"
    env = {k: v for k, v in os.environ.items() if k != "SLIME_PATH"}
    env |= {
        "PYTHONPATH": f"{tree}:{trees.ROOT}",
        "SLIME_CONTRACT_DYNAMIC_SAMPLING_FILTER_PATH": filter_path,
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(contracts),
         str(contracts / "test_plugin_path_loading_contracts.py"), "-k", "dynamic"],
        capture_output=True, text=True, env=env, cwd="/", timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


SEAM = r"""
from argparse import Namespace
import torch
from megatron.core import mpu
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.slime_plugin import mismatch
import slime.backends.megatron_utils.actor as actor
place = getattr(actor, "train_metric_utils", actor)
seen = []
place.log_rollout_data = lambda rollout_id, args, rollout_data: seen.append(dict(rollout_data))
args = Namespace(max_train_rollout_diff=None)
print(mismatch.install(args), mismatch.install(args))
a = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])]
data = {"log_probs": a, "rollout_log_probs": [x.clone() for x in a], "loss_masks": [torch.ones(2), torch.ones(1)],
        "total_lengths": [4, 3], "response_lengths": [2, 1]}
place.log_rollout_data(0, args, data)
assert seen[0]["train_rollout_kl"] == [0.0] and seen[0]["train_rollout_logprob_max_diff"] == [0.0], seen
data["rollout_log_probs"][1] -= 2
try:
    place.log_rollout_data(1, args, data)
except UserError as error:
    print("STOPPED", error)
assert len(seen) == 2  # logged before it stops
assert place.log_rollout_data(2, args, {"log_probs": None}) is None  # SFT: nothing to compare
"""


@pytest.mark.parametrize("tree", trees.params())
def test_a_rollout_of_other_weights_stops_the_train_actor(tree):
    done = trees.python(tree, SEAM)
    assert "STOPPED rollout 1: train and rollout log-probabilities differ" in done.stdout, (
        done.stderr[-3000:]
    )


IN_STEP = r"""
from argparse import Namespace
import tempfile, torch, torch.distributed as dist
from megatron.core import mpu
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.slime_plugin import mismatch
dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
mpu.initialize_model_parallel()
import slime.backends.megatron_utils.actor as actor, slime.backends.megatron_utils.loss as loss
import slime.backends.megatron_utils.model as model
place = actor.train_metric_utils
place.log_rollout_data = lambda rollout_id, args, rollout_data: None
steps = []
model.finalize_model_grads = lambda *a, **k: steps.append(a)
args = Namespace(max_train_rollout_diff=None, use_wandb=False, use_tensorboard=False, wandb_always_use_train_step=False)
print(mismatch.install(args))
here = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])]
def batch(shift):
    return {"rollout_log_probs": [x + shift for x in here], "loss_masks": [torch.ones(2), torch.ones(1)],
            "total_lengths": [4, 3], "response_lengths": [2, 1]}
for rollout_id, shift in ((0, 0.0), (1, 0.5)):
    # What slime does where it reuses the step's own log-probabilities: none before the step.
    place.log_rollout_data(rollout_id, args, batch(shift))
    for _ in range(2):
        loss._maybe_capture_log_probs(batch(shift), here)
    try:
        model.finalize_model_grads([], None)
        print("STEP", rollout_id)
    except UserError as error:
        print("STOPPED", error)
assert len(steps) == 1, steps
"""


@pytest.mark.parametrize("tree", trees.params())
def test_the_difference_is_judged_before_the_optimizer_where_slime_reuses_log_probs(tree):
    if (
        "can_reuse_log_probs_in_loss"
        not in (tree / "slime" / "backends" / "megatron_utils" / "actor.py").read_text()
    ):
        pytest.skip("this slime computes log-probabilities before the step")
    done = trees.python(tree, IN_STEP)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "STEP 0" in done.stdout
    assert "STOPPED rollout 1: train and rollout log-probabilities differ by 0.5" in done.stdout


PIPELINE = r"""
import os, sys, tempfile
store = tempfile.mktemp()
child = os.fork()
rank = 1 if child == 0 else 0
os.environ["RANK"] = str(rank)
from argparse import Namespace
import torch, torch.distributed as dist
from megatron.core import mpu
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
mpu.initialize_model_parallel(pipeline_model_parallel_size=2)
from megatron_fp8_ext.slime_plugin import mismatch
import slime.backends.megatron_utils.actor as actor, slime.backends.megatron_utils.model as model
import slime.backends.megatron_utils.loss as loss
place = getattr(actor, "train_metric_utils", actor)
place.log_rollout_data = lambda rollout_id, args, rollout_data: None
model.finalize_model_grads = lambda *a, **k: None
args = Namespace(max_train_rollout_diff=None, use_wandb=False, use_tensorboard=False, wandb_always_use_train_step=False)
mismatch.install(args)
here = [torch.tensor([-1.0, -2.0])]
batch = {"rollout_log_probs": [x + 0.05 for x in here], "loss_masks": [torch.ones(2)], "total_lengths": [4],
         "response_lengths": [2]}
last = mpu.is_pipeline_last_stage()
assert last == (rank == 1)
place.log_rollout_data(0, args, {**batch, "log_probs": here if last else None})
if hasattr(loss, "_maybe_capture_log_probs"):  # v0.3: in the step, where the last stage has the logits
    place.log_rollout_data(1, args, dict(batch))
    if last:
        loss._maybe_capture_log_probs(batch, here)
    model.finalize_model_grads([], None)
dist.barrier()
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize("tree", trees.params())
def test_the_last_pipeline_stage_prints_what_it_alone_has(tree):
    done = trees.python(tree, PIPELINE)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [x for x in done.stdout.splitlines() if "train/rollout KL" in x]
    rollouts = (0, 1) if checkout.read(tree, "").per_step_batch else (0,)
    assert len(lines) == len(rollouts)
    for line, rollout in zip(lines, rollouts, strict=True):
        assert line.startswith(f"megatron_fp8_ext [rank 1]: rollout {rollout}: train/rollout KL")
        assert "mean 5.000e-02 max 5.000e-02" in line
