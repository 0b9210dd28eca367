"""Checkpoint indexes are read without unpickling anything but an index."""

from __future__ import annotations

import os
import pickle

import pytest

from megatron_fp8_ext.checkpoint import layout
from megatron_fp8_ext.errors import UserError


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_foreign_classes_are_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="has no place in a checkpoint index"):
        layout.read(tmp_path, 1)
    assert not (tmp_path / "pwned").exists()


def test_damaged_index_is_one_line(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"\x80\x04garbage")
    with pytest.raises(UserError, match="cannot be read"):
        layout.read(tmp_path, 1)


def test_no_tracker_means_a_fresh_start(tmp_path):
    assert layout.find(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("text", "message"), [("x", "neither"), ("7", "iter_0000007 is not there")]
)
def test_bad_trackers(tmp_path, text, message):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        layout.find(str(tmp_path))


def test_names_tell_the_optimizer_layout(tmp_path):
    torch = pytest.importorskip("torch")
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )

    def tensor(*size):
        chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), torch.Size(size))
        return TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size(size), [chunk])

    buffer = (
        "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_({}, torch.float32).bucket_idx_0"
    )
    for name, wanted in {
        "optimizer.state.fp32_param.embedding.word_embeddings.weight": ("plain", False),
        "optimizer.state.param.embedding.word_embeddings.weight": ("by parameter", False),
        buffer.format("torch.bfloat16") + ".param": ("whole buffers", False),
        buffer.format("torch.uint8") + ".param": ("whole buffers", True),
        "decoder.final_layernorm.weight": ("none", False),
    }.items():
        entries = {name: tensor(3, 5), "rng_state/shard_0": BytesStorageMetadata()}
        (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata(entries)))
        found = layout.read(tmp_path, 2)
        assert (found.optimizer, found.fp8_params) == wanted
    assert found.shapes == {"decoder.final_layernorm.weight": (3, 5)}
