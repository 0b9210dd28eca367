"""The ready-made comparisons: what they run, without running it."""

from __future__ import annotations

import json
import os
from unittest import mock

import pytest
from hf_models import ALIGNED
from rich.console import Console

from megatron_fp8_ext.commands import compare
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
    assert arguments.value(ready.command, "--lr-warmup-iters") == "100"
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


@pytest.fixture
def preset(tmp_path):
    """Words of a preset that lacks nothing, and what `compare` makes of them."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(ALIGNED))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    for suffix in (".idx", ".bin"):
        (tmp_path / f"text{suffix}").write_bytes(b"text")

    def command(name, *words):
        given = [f"data={tmp_path / 'text'}", f"model={tmp_path / 'model'}"]
        with mock.patch.dict(os.environ):
            return compare._of_preset([name, *given, *words], tmp_path / "out")

    return command


def test_a_preset_is_compared(preset, tmp_path):
    short = ("lr-warmup-iters=2", "lr-wsd-decay-iters=4", "gpus-per-node=2", "from-scratch=true")
    command = preset("qwen2.5-1.5b-cpt", *short, "--lr", "3e-4")
    assert command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert arguments.value(command, "--lr") == "3e-4"
    assert not arguments.has(command, "--load")
    members = plan.plan(command, ["bf16", "infir2"], 2, 20, tmp_path / "out")
    assert [m.name for m in members[:2]] == ["bf16-seed1236", "infir2-seed1236"]
    for member in members:
        assert member.argv.count("--fp8-recipe") == 1 and member.saves
        assert arguments.value(member.argv, "--save") == str(member.checkpoints)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("qwen2.5-1.5b-cpt", [], "cannot start: continual pre-training without a checkpoint"),
        ("qwen2.5-1.5b-cpt", ["seeed=1"], "did you mean 'seed'"),
        ("qwen2.5-1.5b-cpt", ["fast"], "fast: write it as key=value"),
        ("qwen2.5-1.5b-sft-stage1", [], "add trainer=megatron"),
    ],
)
def test_presets_that_cannot_be_compared(preset, name, words, message):
    with pytest.raises(UserError, match=message):
        preset(name, *words)
