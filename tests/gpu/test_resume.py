"""kill -9 at random moments on one GPU, the same command again: equal within the run-to-run noise.

The noise is measured first, from two uninterrupted runs. MEGATRON_FP8_TEST_SEED chooses other moments,
MEGATRON_FP8_TEST_KILLS how many; -s prints noise, kills and differences.
"""

from __future__ import annotations

import os

import kills
import pytest
from conftest import NATIVE_SCHEDULE

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a Hopper GPU", allow_module_level=True)
pytest.importorskip("transformer_engine.pytorch", reason="needs TransformerEngine")

pytestmark = pytest.mark.gpu
# Weights kept in FP8 (fp8-param-gather), which the recipe switches on; dropout needs the random state.
FLAGS = (
    "--use-distributed-optimizer --no-gradient-accumulation-fusion --fp8-recipe infir2 "
    "--hidden-dropout 0.1 --lr-schedule wsd --wsd-warmup-iters 2 --wsd-stable-iters 8 "
    "--wsd-decay-iters 6 --lr 1e-3 --min-lr 1e-5 --save-interval 2"
).split()
NATIVE = (*NATIVE_SCHEDULE, "--save-interval")


def test_killed_at_random_moments(train, tmp_path):
    def start(save, kill):
        place = ["--save", str(save), "--load", str(save)]
        outcome = train(*FLAGS, *place, without=NATIVE, ok=False, kill=kill)
        if outcome.code == 0:
            assert any("weights kept in FP8" in line for line in outcome.said)
        return outcome

    seed = int(os.environ.get("MEGATRON_FP8_TEST_SEED", "1"))
    kills.resumes_within_the_noise(
        start, tmp_path, seed, int(os.environ.get("MEGATRON_FP8_TEST_KILLS", "2"))
    )
