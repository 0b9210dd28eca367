"""kill -9 in and between checkpoint writes, the same command again: every digit of an uninterrupted run.

The process is killed by itself at the moment asked for (observed.py), or from outside at a random one
(kills.py). MEGATRON_FP8_TEST_SEED chooses other random moments, MEGATRON_FP8_TEST_KILLS how many (-s shows
them).
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import kills
import pytest
import torch
from conftest import NATIVE_SCHEDULE

from megatron_fp8_ext.checkpoint import complete
from megatron_fp8_ext.checkpoint.torch_dist import TorchDist

pytestmark = [pytest.mark.megatron, pytest.mark.slow]
OBSERVED = Path(__file__).with_name("observed.py")
ITERATIONS, EVERY = 16, 2
# Dropout needs the random state, Adam its moments.
COMMAND = (
    "--use-distributed-optimizer --fp8-recipe infir2 --hidden-dropout 0.1 --lr-schedule wsd "
    "--wsd-warmup-iters 2 --wsd-stable-iters 8 --wsd-decay-iters 6 --lr 1e-3 --min-lr 1e-5"
).split()
NATIVE = (*NATIVE_SCHEDULE, "--save-interval")
# One save writes: data, index (and its rename), plan (and its rename), metadata.json, tracker.
WRITES = 7


def test_the_same_command_again_after_every_kind_of_kill(train, tmp_path):
    rng = random.Random(int(os.environ.get("MEGATRON_FP8_TEST_SEED", "1")))
    whole = train(*COMMAND, without=NATIVE)
    anywhere = f"{rng.randint(1, WRITES)}:{rng.choice(('before', 'torn', 'after'))}"
    kills = [
        # what is left behind; how; what the next start continues from, and says
        ("half of the data of iteration 4", {"KILL_AT": f"{WRITES + 1}:torn"}, 2, None),
        ("complete, not named", {"KILL_AT": f"{2 * WRITES}:before"}, 6, "txt still says 4"),
        # two more writes: the tracker is mended first
        ("an empty tracker", {"KILL_AT": f"{2 + WRITES}:torn"}, 8, "txt is empty"),
        ("between two saves", {"KILL_BEFORE_STEP": str(rng.randrange(9, 13))}, None, None),
        ("anywhere in a save", {"KILL_AT": anywhere}, None, None),
        ("nothing", {}, None, None),
    ]
    save = ["--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", str(EVERY)]
    seen = {}
    begins, expected = 1, None
    for what, environment, continues, says in kills:
        outcome = train(*COMMAND, *save, script=OBSERVED, without=NATIVE, ok=False, **environment)
        assert outcome.code == (-9 if environment else 0), (what, outcome.output[-3000:])
        if expected is not None:
            assert any(expected in line for line in outcome.said), what
        numbers = [i.number for i in outcome.iterations]
        assert numbers == list(range(begins, begins + len(numbers))), what
        for iteration in outcome.iterations:
            seen.setdefault(iteration.number, []).append(
                (iteration, iteration.number == begins + 1)
            )
        chosen = complete.choose(tmp_path)
        assert continues in (None, chosen.iteration), what
        begins, expected = chosen.iteration + 1, says
    assert sorted(seen) == list(range(1, ITERATIONS + 1))
    uninterrupted = {i.number: i for i in whole.iterations}
    for number, found in seen.items():
        for iteration, second_after_start in found:
            theirs = uninterrupted[number]
            assert iteration.learning_rate == theirs.learning_rate
            assert iteration.grad_norm == theirs.grad_norm
            # Megatron logs the mean of the first two iterations after a start as the second's.
            if not second_after_start:
                assert iteration.loss == theirs.loss


def same_checkpoint(ours: Path, theirs: Path) -> None:
    """Weights, moments and all other tensors, bit for bit."""
    one, other = TorchDist(ours), TorchDist(theirs)
    assert set(one.tensors) == set(other.tensors) and len(one.tensors) > 20
    assert any(name.startswith("optimizer.state.exp_avg_sq") for name in one.tensors)
    for name in one.tensors:
        assert torch.equal(one.read(name), other.read(name)), name


@pytest.mark.parametrize("what", ["run", "branch"])
def test_random_kills_from_outside(train, tmp_path, what):
    """Whole process group, at any time; losses, norms, rates and the last checkpoint are the same."""
    saving = ["--save-interval", str(EVERY), "--dist-ckpt-optim-fully-reshardable"]
    stable, first, last = tmp_path / "stable", 1, ITERATIONS

    def whole_run(save, **options):
        flags = [*COMMAND, *saving, "--save", str(save), "--load", str(save)]
        return train(*flags, without=NATIVE, ok=False, **options)

    def branch(save, **options):
        at = COMMAND.index("--lr-schedule")
        flags = [*COMMAND[:at], *saving, "--wsd-decay-from", str(stable / "iter_0000006")]
        flags += ["--wsd-decay-iters", "8", "--min-lr", "1e-4", "--save", str(save)]
        return train(*flags, without=NATIVE, ok=False, **options)

    command = whole_run
    if what == "branch":
        assert whole_run(stable).code == 0
        command, first, last = branch, 7, 14
    watch = kills.Watch(tmp_path / "whole")
    whole = command(tmp_path / "whole", kill=watch)
    assert [i.number for i in whole.iterations] == list(range(first, last + 1)), whole.output[
        -3000:
    ]
    seed = int(os.environ.get("MEGATRON_FP8_TEST_SEED", "1"))
    times = int(os.environ.get("MEGATRON_FP8_TEST_KILLS", "4"))
    save = tmp_path / "killed"
    outcomes = kills.soak(
        lambda kill: command(save, kill=kill), save, kills.Rhythm.of(watch), seed, times
    )
    assert sum(outcome.code == -9 for outcome in outcomes) == times
    found = kills.differences(outcomes, whole.iterations)
    assert set(found) == set(range(first, last + 1)) and set(found.values()) == {0.0}
    norms = {i.number: i.grad_norm for i in whole.iterations}
    for outcome in outcomes:
        assert all(i.grad_norm == norms[i.number] for i in outcome.iterations)
    name = f"iter_{last:07d}"
    same_checkpoint(save / name, tmp_path / "whole" / name)


@pytest.mark.parametrize("named", ["tracker", "none"])
def test_what_is_said_of_a_broken_checkpoint(train, tmp_path, named):
    flags = [*COMMAND, "--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2"]
    train(*flags, "--exit-interval", "4", without=NATIVE)
    (tmp_path / "iter_0000004" / "metadata.json").unlink()
    if named == "none":
        (tmp_path / "iter_0000002" / "__0_0.distcp").unlink()
    outcome = train(*flags, "--exit-interval", "3", without=NATIVE, ok=False)
    if named == "tracker":
        assert outcome.code == 0 and [i.number for i in outcome.iterations] == [3]
        assert any(
            "iter_0000004: it has no metadata.json, which is written last; continuing from iteration 2, "
            "the last complete one" in line
            for line in outcome.said
        )
    else:
        assert outcome.code == 2 and not outcome.iterations
        assert "names iteration 4, but iter_0000004 is not complete" in outcome.said[-1]
