"""`demo sft --pretrained`: real weights, two SFT stages, both precisions, at the smallest scale."""

from __future__ import annotations

import csv
import sys

import pytest
from conftest import run

from megatron_fp8_ext.demo.text import tokenizer_file
from megatron_fp8_ext.errors import UserError

pytestmark = [pytest.mark.megatron, pytest.mark.slow, pytest.mark.timeout(3600)]


def test_both_stages_train_from_released_weights(tmp_path):
    pytest.importorskip("transformers")
    try:
        tokenizer_file()
    except UserError as error:
        pytest.skip(str(error))
    argv = [sys.executable, "-m", "megatron_fp8_ext.cli", "demo", "sft", "--pretrained"]
    done = run([*argv, "--samples", "20", "--output", str(tmp_path)], timeout=3500)
    assert done.code == 0, done.output[-4000:]
    with (tmp_path / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["stage"], row["step"]) for row in rows] == [
        *(("1", str(step)) for step in range(1, 6)), *(("2", str(step)) for step in range(1, 11)),
    ]  # fmt: skip
    for recipe in ("bf16", "infir2"):
        losses = {(row["stage"], row["step"]): float(row[recipe] or "nan") for row in rows}
        # Released weights know English: far below ln(49152) = 10.8; stage 2 begins where 1 ended.
        assert losses["1", "1"] < 4 and losses["2", "1"] < 0.8 * losses["1", "1"]
        assert losses["2", "10"] < losses["1", "1"]
    assert rows[0]["bf16"] != rows[0]["infir2"]
    for name in ("summary.md", "loss-stage1.svg", "loss-stage2.svg", "stage2/report.html"):
        assert (tmp_path / name).stat().st_size > 0
    assert "| 2 | infir2 | 10 |" in (tmp_path / "summary.md").read_text()
