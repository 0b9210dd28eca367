"""Our loss inside slime's own loss path, and Megatron's reduction after it, against one FP32 batch."""

from __future__ import annotations

import json

import pytest
import trees

pytestmark = pytest.mark.slime

# slime's loss_function on CPU tensors, micro-batch by micro-batch and rank by rank, followed by what Megatron does
# under --calculate-per-token-loss: sum of micro-batches and ranks, once divided by the summed token counts.
CODE = r"""
import json, sys, inspect
from argparse import Namespace
import torch
from megatron.core import mpu
cases = json.loads(sys.argv[1])
mpu.get_context_parallel_world_size = lambda *a, **k: 1
mpu.get_tensor_model_parallel_rank = lambda: 0
mpu.get_tensor_model_parallel_world_size = lambda: 1
mpu.get_context_parallel_rank = lambda: 0
mpu.get_tensor_model_parallel_group = lambda *a, **k: None
mpu.get_data_parallel_world_size = lambda *a, **k: now[0]
now = [1]
import torch.distributed as dist
import os, tempfile
dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
mpu.get_tensor_model_parallel_group = lambda *a, **k: dist.group.WORLD
import slime.backends.megatron_utils.loss as L
from megatron_fp8_ext.slime_plugin import reduction
V, lengths, responses = 16, [9, 5, 12, 7], [4, 2, 7, 3]
torch.manual_seed(0)
tokens = [torch.randint(0, V, (n,)) for n in lengths]
masks = [torch.ones(r, dtype=torch.int) for r in responses]
masks[2][1] = 0
embedding = torch.randn(V, V, requires_grad=True)
def batch(indices):
    take = lambda xs: [xs[i] for i in indices]
    return {"unconcat_tokens": take(tokens), "total_lengths": take(lengths), "response_lengths": take(responses),
            "loss_masks": take(masks), "rollout_mask_sums": [masks[i].sum() for i in indices]}
def one(split, mended, data_parallel):
    now[0] = data_parallel
    args = Namespace(loss_type="custom_loss" if mended else "sft_loss", calculate_per_token_loss=True, global_batch_size=len(tokens),
        custom_loss_function_path="megatron_fp8_ext.slime_plugin.sft_loss", recompute_loss_function=False,
        allgather_cp=False, rollout_temperature=1.0, qkv_format="thd", true_on_policy_mode=False, use_rollout_top_p=False,
        log_probs_chunk_size=-1, entropy_coef=0.0, rollout_top_p=1.0, multimodal_keys=None, save_debug_train_data=None)
    rows = [(n, [split[j] for j in range(r, len(split), data_parallel)]) for r in range(data_parallel) for n in [None]]
    embedding.grad = None
    total, counted, reported, weight = 0.0, 0, 0.0, 0.0
    for _, microbatches in rows:
        for indices in microbatches:
            logits = embedding[torch.cat([tokens[i] for i in indices])].unsqueeze(0).float()
            extra = (len(tokens),) if "step_global_batch_size" in inspect.signature(L.loss_function).parameters else ()
            loss, count, log = L.loss_function(args, batch(indices), len(microbatches), *extra, logits)
            total, counted = total + loss, counted + int(count)
            weight += float(log["values"][0]); reported += float(log["values"][1])
    (total / counted).backward()
    grad = embedding.grad
    reference = torch.zeros(()); n = 0
    with torch.enable_grad():
        e = embedding.detach().clone().requires_grad_()
        for t, length, r, m in zip(tokens, lengths, responses, masks):
            lp = torch.log_softmax(e[t].float(), -1)[torch.arange(length - r - 1, length - 1), t[length - r:]]
            reference = reference - (lp * m).sum(); n += int(m.sum())
        (reference / n).backward()
    return {"ratio": float((grad * e.grad).sum() / (e.grad ** 2).sum()),
        "error": float((grad - e.grad).abs().max()), "reported": reported / weight, "expected": float(reference / n),
        "tokens": counted, "n": n}
out = [one([[0, 1], [2], [3]], False, 1)]
import slime.backends.megatron_utils.model
reduction.install()
out += [one(split, True, dp) for split, dp in cases]
print(json.dumps(out))
"""

SPLITS = [
    ([[0, 1, 2, 3]], 1),
    ([[0], [1], [2], [3]], 1),
    ([[0, 1], [2], [3]], 1),
    ([[0, 3], [1], [2]], 2),
]


@pytest.mark.parametrize("tree", trees.params())
def test_gradient_is_that_of_one_fp32_batch(tree):
    """Tolerance: Megatron's vocabulary-parallel cross-entropy rounds its gradient to BF16 (2^-8)."""
    done = trees.python(tree, CODE, json.dumps(SPLITS))
    assert done.returncode == 0, done.stderr[-3000:]
    alone, *ours = json.loads(done.stdout.splitlines()[-1])
    for got, (split, _) in zip(ours, SPLITS, strict=True):
        assert got["tokens"] == got["n"], split
        assert got["ratio"] == pytest.approx(1, abs=2e-3), split
        assert got["error"] < 2e-3, split
        assert got["reported"] == pytest.approx(got["expected"], rel=1e-5)
    # The reason for the mend: at 8359c9a the scale was num_microbatches * dp / global batch size.
    old = not trees.checkout.read(tree, "").per_step_batch
    assert alone["ratio"] == pytest.approx(3 / 4 if old else 1.0, abs=2e-3)
