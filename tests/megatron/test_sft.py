"""Packed SFT through Megatron's own loop on the CPU: every split of the batch is the same training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SFT, run

pytestmark = [pytest.mark.megatron, pytest.mark.slow]


@pytest.fixture(scope="session")
def start(sft, tmp_path_factory):
    """(checkpoint of iteration 2, the whole run, its continuation from that checkpoint)."""
    folder = str(tmp_path_factory.mktemp("start"))
    whole = sft("--save", folder, "--save-interval", "2")
    Path(folder, "latest_checkpointed_iteration.txt").write_text("2")
    return folder, whole, sft("--load", folder)


def test_a_pack_is_its_samples_alone():
    """Logits, loss and gradient of packs against stock Megatron on one dense FP32 batch."""
    done = run([sys.executable, "-W", "ignore", str(ROOT / "tests/megatron/packed_gradients.py")])
    assert done.code == 0, done.output[-3000:]
    found = json.loads(done.output[done.output.index('{"stock loss"') :].splitlines()[0])
    assert len(found["splits"]) == 5
    for name, split in found["splits"].items():
        assert split["loss"] == pytest.approx(found["stock loss"], rel=1e-6), name
        assert split["logits"] < 2e-6, name
        assert split["gradient"] < 1e-5 * found["gradient"], name


def test_resume_in_the_middle_of_an_epoch_is_exact(start):
    _, whole, rest = start
    assert sorted(rest.losses) == [3, 4, 5, 6]
    for iteration in (3, 5, 6):  # Megatron logs the mean of the first two as the second's
        assert rest.losses[iteration] == whole.losses[iteration]
    assert [i.grad_norm for i in rest.iterations] == [i.grad_norm for i in whole.iterations[2:]]
    assert "consumed samples:           48" in rest.output


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (2, ""),
        (2, "--context-parallel-size 2"),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel --seq-length 512"),
        (2, "--pipeline-model-parallel-size 2"),
        (1, "--seq-length 512"),
        (4, "--tensor-model-parallel-size 2 --context-parallel-size 2"),
    ],
    ids=["DP=2", "CP=2", "TP=2 SP, larger packs", "PP=2", "larger packs", "TP=2 CP=2"],
)
def test_every_split_of_the_batch_trains_alike(sft, start, processes, flags):
    """Loss and gradient norm of each step, FP32, to the printed digits' last but one."""
    folder, _, reference = start
    outcome = sft("--load", folder, *flags.split(), processes=processes)
    assert sorted(outcome.losses) == [3, 4, 5, 6]
    for ours, theirs in zip(outcome.iterations, reference.iterations, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)


def test_infir2_is_emulated_in_packs(sft, start):
    folder, _, reference = start
    outcome = sft("--load", folder, "--no-load-optim", "--bf16", "--fp8-recipe", "infir2")
    assert outcome.casts["weight"] > 0
    assert outcome.losses[3] != reference.losses[3]
    assert outcome.losses[3] == pytest.approx(reference.losses[3], rel=5e-3)


def test_sample_mean_is_another_loss(sft, start):
    folder, _, reference = start
    outcome = sft("--load", folder, "--loss", "sample_mean")
    assert outcome.losses[3] != pytest.approx(reference.losses[3], rel=1e-3)


def test_epochs_and_validation(sft, packed):
    base = [x for x in SFT if x not in ("--train-iters", "6")]
    outcome = sft("--sft-epochs", "1", "--sft-valid-data", str(packed), "--eval-iters", "2",
                  "--eval-interval", "3", base=base)  # fmt: skip
    assert sorted(outcome.losses) == [1, 2, 3, 4, 5]  # 40 samples in batches of 8
    assert "validation loss at iteration 3" in outcome.output


def test_epoch_scope_trains_on_packs(sft):
    outcome = sft("--pack-scope", "epoch", "--global-batch-size", "2")
    assert "counts packs" in outcome.output and outcome.losses[6] < outcome.losses[1]


def test_another_seed_may_not_continue_but_a_new_stage_may_start(sft, start):
    folder, _, _ = start
    refused = sft("--load", folder, "--seed", "7", ok=False)
    assert refused.code != 0 and "add --finetune" in refused.said[-1] and not refused.iterations
    stage = sft("--load", folder, "--seed", "7", "--finetune", "--train-iters", "2")
    assert sorted(stage.losses) == [1, 2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--micro-batch-size 2", "--micro-batch-size 2"),
        ("--mock-data", "contradicts --mock-data"),
        ("--loss infialing", "did you mean 'infialign'"),
        ("--seq-length 128", "its longest sample has"),
        ("--seq-length 300", "use 256 or 384"),
        ("--vocab-size 200", "was packed with a tokenizer of"),
        ("--eval-iters 3", "--eval-iters needs --sft-valid-data"),
        ("--sft-epochs 2", "contradicts --train-iters"),
        ("--sft-data /nowhere", "/nowhere: no such directory"),
    ],
)
def test_bad_input_is_one_line(sft, flags, words):
    outcome = sft(*flags.split(), ok=False)
    assert outcome.code == 2, outcome.output[-2000:]
    assert words in outcome.said[-1] and "Traceback" not in outcome.output
    assert not outcome.iterations


def test_inter_document_masking_equals_documents_alone(train, tmp_path):
    """Stock BF16 data, blends and flags; only attention and positions stop at documents."""
    flag = "--dataloader-inter-document-masking"
    masked = train(flag, "--end-of-document-id", "256")
    plain = train()
    assert masked.losses[1] != plain.losses[1]
    assert masked.losses[8] == pytest.approx(plain.losses[8], rel=2e-2)
    wrong = train(flag, ok=False)  # NullTokenizer's own end is another token
    assert wrong.code != 0 and "end with token 256" in wrong.output
