"""`megatron-fp8 run` trains: a preset made tiny, its decay branched from it by --after, on the CPU."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import run

pytestmark = pytest.mark.megatron
TINY = (
    "num-layers=1 hidden-size=64 ffn-hidden-size=128 num-attention-heads=4 num-query-groups=2 "
    "padded-vocab-size=512 seq-length=64 max-position-embeddings=64 global-batch-size=4 "
    "tokenizer-type=NullTokenizer train-iters=6 lr-warmup-iters=1 lr-wsd-decay-iters=2 save-interval=2 "
    "tensor-model-parallel-size=1 eval-iters=0 eval-interval=1000 split=100,0,0 tokenizer-model=none"
).split()
LAST = ["--", "--vocab-size", "511"]


def preset(corpus, *words: str, settings=()):
    sets = [token for text in (*TINY, *settings) for token in ("--set", text)]
    argv = [sys.executable, "-m", "megatron_fp8_ext.cli", "run", *words, "--gpus", "1"]
    return run([*argv, "--data", str(corpus), *sets, *LAST])


def test_cpt_then_its_decay(corpus, tmp_path):
    stable = tmp_path / "stable"
    done = preset(
        corpus,
        "qwen2.5-1.5b-cpt",
        "--output",
        str(stable),
        "--model",
        str(_model(tmp_path)),
        "--from-scratch",
    )
    assert done.code == 0, done.output[-4000:]
    assert [i.number for i in done.iterations] == [1, 2, 3, 4, 5, 6]
    assert done.casts, "FP8 was emulated"
    record = json.loads((stable / "run.json").read_text())
    assert record["stage"] == "cpt" and record["save"] == f"{stable}/checkpoints"

    out = tmp_path / "decay"
    branch = f"{stable}/checkpoints/iter_0000004"
    words = [
        "qwen2.5-1.5b-cpt-decay",
        "--after",
        str(stable),
        "--init",
        branch,
        "--output",
        str(out),
    ]
    done = preset(corpus, *words, settings=("min-lr=1e-5",))
    assert done.code == 0, done.output[-4000:]
    assert [(i.number, i.total) for i in done.iterations] == [(5, 6), (6, 6)]
    assert done.iterations[-1].learning_rate == pytest.approx(1e-5)
    assert (out / "checkpoints" / "iter_0000006").is_dir()


def _model(folder):
    path = folder / "model"
    path.mkdir()
    shape = {
        "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(shape))
    return path
