"""Small torch_dist checkpoints as Megatron leaves them, for tests that need no training."""

from __future__ import annotations

import argparse
import io
import json
import pickle
from pathlib import Path

import pytest


def write(
    root: Path,
    iteration: int,
    args: dict | None = None,
    scheduler: dict | None = None,
    optimizer: bool = True,
    common_file: bool = False,
    tracker: bool = True,
) -> Path:
    """Write a complete checkpoint of a run of 100 iterations of 4 samples: warmup 2, decay from 80 on."""
    torch = pytest.importorskip("torch")
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    state_args = {
        "global_batch_size": 4, "seq_length": 16, "consumed_train_samples": iteration * 4,
        "train_iters": 100, "train_samples": None, "lr_wsd_decay_iters": 20, "lr_wsd_decay_samples": None,
        "lr_wsd_decay_style": "linear", "seed": 1, "split": "99,1,0", "dataloader_type": "single",
        "data_path": ["a"], "params_dtype": torch.bfloat16,
        **(args or {}),
    }  # fmt: skip
    state_scheduler = {
        "max_lr": 1e-3, "min_lr": 1e-5, "lr_warmup_steps": 8, "num_steps": iteration * 4,
        "lr_decay_style": "WSD", "lr_decay_steps": 400, **(scheduler or {}),
    }  # fmt: skip
    common = {"args": argparse.Namespace(**state_args), "iteration": iteration}
    if optimizer:
        common["opt_param_scheduler"] = state_scheduler
    folder = root / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))
    tensor = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([4]), [chunk])
    entries = {"decoder.final_layernorm.weight": tensor}
    if optimizer:
        entries["optimizer.state.param.decoder.final_layernorm.weight"] = tensor
    data, storage = b"", {}
    for name in entries:
        storage[MetadataIndex(name)] = _StorageInfo("__0_0.distcp", len(data), 8)
        data += bytes(8)
    blob = io.BytesIO()
    if common_file:
        torch.save(common, folder / "common.pt")
    else:
        torch.save([common], blob)
        entries["common_state/shard_0_1"] = BytesStorageMetadata()
        storage[MetadataIndex("common_state/shard_0_1")] = _StorageInfo(
            "__0_0.distcp", len(data), len(blob.getvalue())
        )
        data += blob.getvalue()
    (folder / "__0_0.distcp").write_bytes(data)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(entries, storage_data=storage)))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    if tracker:
        (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder
