"""Adding the flag to a running BF16 job, and taking it off again, through the real loop on the CPU.

The GPU side of the same (FP8 weights, real TransformerEngine) is in docs/results/.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fp8_ext.checkpoint import layout

pytestmark = pytest.mark.megatron
DIST = ["--use-distributed-optimizer"]
RESHARDABLE = ["--dist-ckpt-optim-fully-reshardable"]
CASES = {
    "distributed": (DIST, "whole buffers"),
    "distributed, reshardable": ([*DIST, *RESHARDABLE], "by parameter"),
    "plain": ([], "plain"),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


def half(train, recipe: list[str], flags: list[str], folder: Path):
    return train(
        *flags, *recipe, "--save", str(folder), "--save-interval", "4", "--exit-interval", "4"
    )


def test_bf16_continues_in_infir2_and_back(train, tmp_path, case):
    flags, stored = case
    bf16, infir2 = ["--fp8-recipe", "bf16"], ["--fp8-recipe", "infir2"]
    # A plain BF16 run of Megatron: our flag is not even on its command line.
    first = half(train, [], flags, tmp_path / "bf16")
    assert not first.casts
    found = layout.find(str(tmp_path / "bf16"))
    assert (found.optimizer, found.iteration, found.fp8_params) == (stored, 4, False)

    onward = train(*flags, *infir2, "--load", str(tmp_path / "bf16"))
    same = train(*flags, *bf16, "--load", str(tmp_path / "bf16"))
    assert sorted(onward.losses) == sorted(same.losses) == [5, 6, 7, 8]
    assert onward.casts["weight"] == 64
    for ours, theirs in zip(onward.iterations, same.iterations, strict=True):
        # schedule and data position continue; moments are kept, or the losses would part
        assert ours.learning_rate == theirs.learning_rate
        assert ours.loss == pytest.approx(theirs.loss, rel=3e-3)
    assert onward.losses[8] != same.losses[8]

    half(train, infir2, flags, tmp_path / "infir2")
    back = train(*flags, "--load", str(tmp_path / "infir2"))  # stock BF16
    assert sorted(back.losses) == [5, 6, 7, 8] and not back.casts
    assert back.losses[8] == pytest.approx(same.losses[8], rel=3e-3)
    assert back.iterations[-1].learning_rate == same.iterations[-1].learning_rate


def test_shapes_are_read_from_a_real_checkpoint(train, tmp_path):
    half(train, [], DIST, tmp_path)
    shapes = layout.find(str(tmp_path)).shapes
    assert shapes["decoder.layers.mlp.linear_fc2.weight"] == (2, 128, 256)
    assert shapes["decoder.final_layernorm.weight"] == (128,)
    assert not any(name.startswith("optimizer") for name in shapes)
