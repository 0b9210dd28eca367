"""`--sft-data` -> native flags, rule by rule."""

from __future__ import annotations

import pytest

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import packed_flags

ASKED = ["--bf16", "--sft-data", "data/sft"]


def test_without_it_nothing_changes():
    argv = ["--bf16", "--micro-batch-size", "4"]
    assert packed_flags.expand(argv) == (argv, ())


def test_what_it_becomes():
    argv, notes = packed_flags.expand(ASKED)
    assert argv[len(ASKED) :] == [
        "--calculate-per-token-loss", "--dataloader-type", "external", "--micro-batch-size", "1",
        "--global-batch-size", "64", "--eval-iters", "0", "--eval-interval", "1000000000",
    ]  # fmt: skip
    assert "loss infialign" in notes[0] and "counts samples" in notes[0]


def test_what_is_written_stands():
    argv, _ = packed_flags.expand([*ASKED, "--global-batch-size", "256", "--micro-batch-size", "1"])
    assert argv.count("--global-batch-size") == argv.count("--micro-batch-size") == 1


@pytest.mark.parametrize("flag", packed_flags.CONTRADICTIONS)
def test_every_contradiction_names_both_flags(flag):
    with pytest.raises(UserError, match=f"--sft-data contradicts {flag}"):
        packed_flags.expand([*ASKED, flag])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--loss", "infialign"], "--loss needs --sft-data"),
        ([*ASKED, "--loss", "nothing"], "nothing"),
        ([*ASKED, "--pack-scope", "step"], "--pack-scope"),
        ([*ASKED, "--dataloader-type", "cyclic"], "--dataloader-type cyclic"),
        ([*ASKED, "--eval-iters", "5"], "--sft-valid-data"),
        (["--sft-data"], "needs a directory"),
    ],
)
def test_mistakes_are_named(argv, words):
    with pytest.raises(UserError, match=words):
        packed_flags.expand(argv)
