"""The ready-made comparisons: what they run, without running it."""

from __future__ import annotations

import pytest
from rich.console import Console

from megatron_fp8_ext.demo import proofs, run
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import arguments
from megatron_fp8_ext.proof import plan

ABLATION = "bf16,infir2,infir2-rl,tensorwise:e4m3,tensorwise,delayed,control-e5m2".split(",")


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "corpus", lambda prefix, console: prefix)
    return lambda words, steps: proofs.prepare(
        words, tmp_path / "start", steps, Console(quiet=True)
    )


def parameters(command) -> int:
    """Of a Qwen2.5-shaped model with tied embeddings, heads of 64."""
    n, h, f, heads, groups, v = (
        int(arguments.value(command, flag))
        for flag in ("--num-layers", "--hidden-size", "--ffn-hidden-size", "--num-attention-heads",
                     "--num-query-groups", "--vocab-size")
    )  # fmt: skip
    qkv = (heads + 2 * groups) * (h // heads)
    return n * (h * qkv + qkv + h * h + 3 * h * f + 2 * h) + v * h + h


def test_qwen_is_of_the_size_its_name_says(prepare, tmp_path):
    ready, steps = prepare(["qwen2.5-0.4b"], None)
    assert steps == 400 and ready.score is None
    assert 0.35e9 < parameters(ready.command) < 0.45e9
    assert arguments.value(ready.command, "--lr-warmup-iters") == "20"
    # The whole ablation plans: 7 recipes x 3 seeds, each a whole command.
    members = plan.plan(ready.command, ABLATION, 3, steps, tmp_path)
    assert len(members) == 21 and len({m.argv for m in members}) == 21
    assert len({m.common for m in members}) == 1


def test_flags_after_the_name_win(prepare):
    ready, _ = prepare(["qwen2.5-0.4b", "--seq-length", "64", "--num-layers=1"], 3)
    assert arguments.value(ready.command, "--seq-length") == "64"
    assert arguments.value(ready.command, "--num-layers") == "1"


@pytest.mark.parametrize(
    ("words", "steps", "message"),
    [
        (["qwen2.5-0.4b", "quickly"], 3, "takes Megatron flags after it, not 'quickly'"),
        (["qwen2.5-0.4b"], 1, "--steps 1: qwen2.5-0.4b needs at least 2"),
    ],
)
def test_bad_requests(prepare, words, steps, message):
    with pytest.raises(UserError, match=message):
        prepare(words, steps)
