"""kill -9 in and between checkpoint writes, the same command again: every digit of an uninterrupted run.

The process is killed by itself at the moment asked for (observed.py); MEGATRON_FP8_TEST_SEED chooses other
random moments.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from megatron_fp8_ext.checkpoint import complete

pytestmark = [pytest.mark.megatron, pytest.mark.slow]
OBSERVED = Path(__file__).with_name("observed.py")
ITERATIONS, EVERY = 16, 2
# Dropout needs the random state, Adam its moments.
COMMAND = (
    "--use-distributed-optimizer --fp8-recipe infir2 --hidden-dropout 0.1 --lr-schedule wsd "
    "--wsd-warmup-iters 2 --wsd-stable-iters 8 --wsd-decay-iters 6 --lr 1e-3 --min-lr 1e-5"
).split()
NATIVE = (
    "--train-iters --lr --min-lr --lr-decay-style --lr-wsd-decay-style --lr-wsd-decay-iters "
    "--lr-warmup-iters --save-interval"
).split()
# One save writes: data, index (and its rename), plan (and its rename), metadata.json, tracker.
WRITES = 7


def test_the_same_command_again_after_every_kind_of_kill(train, tmp_path):
    rng = random.Random(int(os.environ.get("MEGATRON_FP8_TEST_SEED", "1")))
    whole = train(*COMMAND, without=tuple(NATIVE))
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
        outcome = train(
            *COMMAND, *save, script=OBSERVED, without=tuple(NATIVE), ok=False, **environment
        )
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


@pytest.mark.parametrize("named", ["tracker", "none"])
def test_what_is_said_of_a_broken_checkpoint(train, tmp_path, named):
    flags = [*COMMAND, "--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2"]
    train(*flags, "--exit-interval", "4", without=tuple(NATIVE))
    (tmp_path / "iter_0000004" / "metadata.json").unlink()
    if named == "none":
        (tmp_path / "iter_0000002" / "__0_0.distcp").unlink()
    outcome = train(*flags, "--exit-interval", "3", without=tuple(NATIVE), ok=False)
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
