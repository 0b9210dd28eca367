from __future__ import annotations

import dataclasses

import pytest

from megatron_fp8_ext import training_log

LINE = (
    " [2026-01-01 02:23:23.994846] iteration       10/      40 | consumed samples:           40 | "
    "elapsed time per iteration (ms): 112.4 | learning rate: 1.000000E-05 | global batch size:     4 "
    "| lm loss: 5.404810E+00 | loss scale: 1.0 | grad norm: 1.783 | number of skipped iterations:   0 "
    "| number of nan iterations:   0 |"
)


def test_megatrons_line():
    assert training_log.parse_line(LINE) == training_log.Iteration(
        number=10, total=40, loss=5.40481, learning_rate=1e-5, milliseconds=112.4, grad_norm=1.783,
        global_batch_size=4,
    )  # fmt: skip


def test_throughput():
    line = LINE.replace("(ms): 112.4 |", "(ms): 112.4 | throughput per GPU (TFLOP/s/GPU): 401.5 |")
    assert training_log.parse_line(line).teraflops == 401.5


def test_skipped_step_has_no_loss():
    line = LINE.replace("lm loss: 5.404810E+00 | ", "")
    assert training_log.parse_line(line).loss is None


def test_other_lines():
    assert list(training_log.parse(["", "iteration 3", LINE])) == [training_log.parse_line(LINE)]


def test_the_second_loss_of_a_start_is_taken_out_of_the_mean():
    first, second, third = (training_log.parse_line(LINE) for _ in range(3))
    second = dataclasses.replace(second, number=11, loss=(first.loss + 5.0) / 2)
    own = training_log.own_losses([first, second, third])
    assert own[1].loss == pytest.approx(5.0) and (own[0], own[2]) == (first, third)
    skipped = dataclasses.replace(first, loss=None)
    assert training_log.own_losses([skipped, second]) == [skipped, second]
