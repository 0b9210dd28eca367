"""From which rollout the same command goes on, whatever a kill or a full disk left behind."""

from __future__ import annotations

from argparse import Namespace

import checkpoints
import pytest

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.slime_plugin import resumption

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def two(tmp_path):
    for iteration in (0, 1):
        checkpoints.write(tmp_path, iteration)
    return tmp_path


def test_what_is_whole_is_left_alone(two):
    assert resumption.prepare(["--load", str(two)]) == []
    assert resumption.prepare(["--load", str(two / "nowhere")]) == []
    assert resumption.prepare(["--lr", "1e-6"]) == []
    assert resumption.advice(Namespace(save=str(two))).endswith("it goes on after rollout 1")


def test_an_empty_tracker_and_half_a_checkpoint_are_mended(two):
    (two / "iter_0000001" / "metadata.json").unlink()
    (two / TRACKER).write_text("")
    assert resumption.advice(Namespace(save=str(two))).endswith("it goes on after rollout 0")
    (note,) = resumption.prepare(["--lr", "1e-6", "--load", str(two)])
    assert "continuing after rollout 0, the last complete one" in note
    assert (two / TRACKER).read_text() == "0"


def test_half_a_position_in_the_prompts_is_set_aside(two):
    position = two / "rollout" / "global_dataset_state_dict_1.pt"
    position.parent.mkdir()
    position.write_bytes(b"PK\x03\x04 and no end")
    (note,) = resumption.prepare(["--load", str(two)])
    assert "cut short" in note and not position.exists()
    assert (position.parent / "global_dataset_state_dict_1.broken").is_file()


def test_a_chosen_step_and_other_formats_are_obeyed(two):
    (two / TRACKER).write_text("")
    for more in (["--ckpt-step", "1"], ["--ckpt-format", "torch"]):
        assert resumption.prepare(["--load", str(two), *more]) == []
    assert (two / TRACKER).read_text() == ""


def test_nothing_complete_is_said_before_ray_starts(two):
    for iteration in (0, 1):
        (two / f"iter_000000{iteration}" / "metadata.json").unlink()
    with pytest.raises(UserError, match="nor is any other checkpoint there"):
        resumption.prepare(["--load", str(two)])
    assert "nor is any other" in resumption.advice(Namespace(save=str(two)))
