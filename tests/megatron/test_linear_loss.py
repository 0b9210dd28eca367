"""`--linear-cross-entropy` through Megatron's loop on the CPU: the losses are the plain path's.

Tolerance 1e-3 relative: the slices sum in another order, and the head's weight gradient is added in FP32,
where the plain path rounds it to BF16 first.
"""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.megatron, pytest.mark.slow]
DIST = "--use-distributed-optimizer"
FLAG = "--linear-cross-entropy"
CHUNKED, ONE_PASS = (FLAG, "chunked"), (FLAG, "one-pass")


def same(ours, theirs):
    assert sorted(ours.losses) == sorted(theirs.losses)
    for iteration, loss in theirs.losses.items():
        assert ours.losses[iteration] == pytest.approx(loss, rel=1e-3)
    for mine, plain in zip(ours.iterations, theirs.iterations, strict=True):
        assert mine.grad_norm == pytest.approx(plain.grad_norm, rel=2e-2)


@pytest.mark.parametrize(("mode", "what"), [(CHUNKED, "vocabulary"), (ONE_PASS, "tokens")])
def test_bf16_tied(mode, what, train, bf16_run):
    ours = train(DIST, "--fp8-recipe", "bf16", *mode)
    same(ours, bf16_run)
    assert any("GPTModel._postprocess" in line for line in ours.said)
    assert any(f"slices of the {what}" in line for line in ours.said)
    assert not any("otherwise" in line for line in ours.said), "the mask was the weight"
    assert not any("GPTModel._postprocess" in line for line in bf16_run.said)


def test_infir2_tied(train, infir2_run):
    chunked = train(DIST, "--fp8-recipe", "infir2", *CHUNKED)
    same(chunked, infir2_run)
    assert chunked.casts == infir2_run.casts


@pytest.mark.parametrize(
    "flags",
    [
        "--tensor-model-parallel-size 2",
        "--tensor-model-parallel-size 2 --sequence-parallel --untie-embeddings-and-output-weights",
        "--pipeline-model-parallel-size 2",
        "--overlap-grad-reduce --overlap-param-gather --untie-embeddings-and-output-weights",
    ],
    ids=["TP=2", "TP=2 with sequence parallel, untied", "PP=2", "DP=2 overlapped, untied"],
)
def test_parallel_runs(flags, train):
    common = (DIST, "--fp8-recipe", "bf16", *flags.split())
    plain = train(*common, processes=2)
    for mode in (CHUNKED, ONE_PASS):
        same(train(*common, *mode, processes=2), plain)


def test_a_model_without_recipe_flag(train, bf16_run):
    same(train(DIST, *CHUNKED), bf16_run)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--linear-cross-entropy", "liger"),
            "got 'liger'; give it one of: off, chunked, one-pass",
        ),
        (("--linear-cross-entropy",), "got no value"),
        ((*CHUNKED, "--cross-entropy-loss-fusion"), "contradicts --cross-entropy-loss-fusion"),
    ],
)
def test_bad_input_is_one_line(flags, message, train):
    refused = train("--fp8-recipe", "bf16", *flags, ok=False)
    assert refused.code == 2 and message in refused.said[-1]
