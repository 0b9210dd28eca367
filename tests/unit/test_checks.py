from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_fp8_ext.checkpoint.layout import CheckpointLayout
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import checks


def args(**changes):
    base = {
        "seq_length": 4096, "micro_batch_size": 1, "tensor_model_parallel_size": 1,
        "context_parallel_size": 1, "sequence_parallel": False, "hidden_size": 1536,
        "ffn_hidden_size": 8960, "num_layers": 28, "num_experts": None, "vocab_size": None,
    }  # fmt: skip
    return Namespace(**{**base, **changes})


@pytest.mark.parametrize(
    ("changes", "good"),
    [
        ({"seq_length": 1000}, "992 or 1008"),
        ({"seq_length": 1000, "micro_batch_size": 2}, None),
        ({"seq_length": 1001, "micro_batch_size": 2}, "1000 or 1008"),
        (
            {"seq_length": 520, "tensor_model_parallel_size": 4, "sequence_parallel": True},
            "512 or 576",
        ),
        ({"seq_length": 520, "tensor_model_parallel_size": 4}, "512 or 528"),
        ({"seq_length": 4096, "context_parallel_size": 2}, None),
        ({"seq_length": 4104, "context_parallel_size": 2}, "4096 or 4128"),
    ],
)
def test_token_counts_name_the_nearest_good_sizes(changes, good):
    if good is None:
        checks.shapes_fit_fp8(args(**changes), "infir2", 1)
        return
    with pytest.raises(UserError, match=f"use --seq-length {good}"):
        checks.shapes_fit_fp8(args(**changes), "infir2", 1)
    # and each of them is good
    for seq in good.split(" or "):
        checks.shapes_fit_fp8(args(**{**changes, "seq_length": int(seq)}), "infir2", 1)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"hidden_size": 1000}, "--hidden-size 1000"),
        ({"ffn_hidden_size": 8968}, "--ffn-hidden-size 8968"),
        ({"ffn_hidden_size": 8960, "tensor_model_parallel_size": 32}, "--ffn-hidden-size 8960"),
    ],
)
def test_features_must_be_aligned(changes, flag):
    with pytest.raises(UserError, match=flag):
        checks.shapes_fit_fp8(args(**changes), "infir2", 1)


def test_missing_and_empty_corpus(tmp_path):
    missing = tmp_path / "nothing"
    with pytest.raises(UserError, match=r"nothing\.idx does not exist.*data tokenize"):
        checks.corpus_exists(Namespace(data_path=["0.5", str(missing)]))
    for suffix in (".idx", ".bin"):
        (tmp_path / f"empty{suffix}").touch()
    with pytest.raises(UserError, match="is empty"):
        checks.corpus_exists(Namespace(data_path=[str(tmp_path / "empty")]))


def test_checkpoint_of_another_shape_names_both_values():
    shapes = {
        "decoder.final_layernorm.weight": (1024,),
        "decoder.layers.mlp.linear_fc2.weight": (28, 1024, 8960),
        "embedding.word_embeddings.weight": (151936, 1024),
    }
    found = CheckpointLayout(Path("c/iter_0000001"), 1, shapes, "none")
    with pytest.raises(UserError, match=r"--hidden-size 1024, the command says --hidden-size 1536"):
        checks.checkpoint_fits(args(), found)
    with pytest.raises(UserError, match="--num-layers 28, the command says --num-layers 24"):
        checks.checkpoint_fits(args(hidden_size=1024, num_layers=24), found)
    with pytest.raises(UserError, match="--vocab-size"):
        checks.checkpoint_fits(args(hidden_size=1024, vocab_size=200000), found)
    checks.checkpoint_fits(args(hidden_size=1024, vocab_size=151665), found)
