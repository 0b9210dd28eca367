"""What a user gets wrong before a run: one clear line, exit code not 0, nothing written."""

from __future__ import annotations

import sys

import pytest
from conftest import ENTRY, MODEL, ROOT, TRAINING, run

pytestmark = pytest.mark.megatron
INFIR2 = ("--fp8-recipe", "infir2")


def refused(outcome, *words: str) -> None:
    assert outcome.code == 2, outcome.output[-2000:]
    assert outcome.said[-1].startswith("megatron_fp8_ext: error: ")
    for word in words:
        assert word in outcome.said[-1]
    assert "Traceback" not in outcome.output
    assert not outcome.iterations


def test_unknown_recipe(train):
    refused(train("--fp8-recipe", "infir3", ok=False), "'infir3'", "did you mean 'infir2'")


def test_missing_corpus(train):
    refused(train(*INFIR2, "--data-path", "/nowhere/text", ok=False), "/nowhere/text.idx does not")


def test_empty_corpus(train, tmp_path):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"text{suffix}").touch()
    refused(train(*INFIR2, "--data-path", str(tmp_path / "text"), ok=False), "is empty")


def test_checkpoint_of_another_shape(train, tmp_path):
    train(*INFIR2, "--train-iters", "1", "--save", str(tmp_path), "--lr-wsd-decay-iters", "0",
          "--lr-warmup-iters", "0")  # fmt: skip
    outcome = train(*INFIR2, "--load", str(tmp_path), "--hidden-size", "256", ok=False)
    refused(outcome, "--hidden-size 128", "--hidden-size 256")


def test_damaged_checkpoint(train, tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    refused(train(*INFIR2, "--load", str(tmp_path), ok=False), "iter_0000005 is not there")


def test_odd_token_count(train):
    flags = ("--seq-length", "100", "--micro-batch-size", "1", "--max-position-embeddings", "100")
    refused(train(*INFIR2, *flags, ok=False), "use --seq-length 96 or 112")


def test_no_megatron(tmp_path):
    """The entry script in an environment that has torch's name and no Megatron."""
    (tmp_path / "torch.py").touch()
    outcome = run(
        [sys.executable, "-S", str(ENTRY), *MODEL, *TRAINING, *INFIR2],
        PYTHONPATH=f"{tmp_path}:{ROOT}",
    )
    refused(outcome, "Megatron is not installed", "pip install")


def test_no_torch():
    outcome = run([sys.executable, "-S", str(ENTRY), *INFIR2])
    refused(outcome, "torch is not installed")


def test_what_only_megatron_lms_script_does_is_named(train):
    outcome = train("--mtp-num-layers", "1", ok=False)
    assert outcome.code != 0
    assert "--mtp-num-layers needs Megatron-LM's own script" in outcome.output
