"""Packed samples through TransformerEngine's THD attention on a GPU equal each sample alone.

Tolerances: BF16 logits of O(1) within 0.05, and within 3e-2 of the largest gradient; under FP8 the same
samples in other packs move only what shares a 128-token scale block of wgrad, so losses agree to 2e-2.
RoPE is Megatron's own and TransformerEngine's fused one, which is the default of a training run. Runs through
the loop print five digits of a loss in BF16; splits of the batch and infir2 stay within 1e-2 of it.
"""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a Hopper GPU", allow_module_level=True)
pytest.importorskip("transformer_engine.pytorch", reason="needs TransformerEngine")

import numpy as np  # noqa: E402
from conftest import free_port  # noqa: E402

from megatron_fp8_ext.packing import batches  # noqa: E402
from megatron_fp8_ext.sft import loss  # noqa: E402

pytestmark = pytest.mark.gpu
LENGTHS = (300, 40, 700, 129, 512, 3)
LAYOUT = batches.Layout(capacity=2048, multiple=128, ranks=1, batch=len(LENGTHS))
SPLITS = {
    "one pack": [[0, 1, 2, 3, 4, 5]],
    "two packs": [[2, 5, 1], [0, 3, 4]],
    "with an empty pack": [[0, 1, 2, 3], [], [4, 5]],
}


@pytest.fixture(scope="module")
def group():
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    from megatron.core import parallel_state, tensor_parallel

    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def build(fp8: bool, fused_rope: bool = True):
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.transformer import TransformerConfig

    more = {"fp8": "e4m3", "fp8_recipe": "blockwise"} if fp8 else {}
    config = TransformerConfig(
        num_layers=2, hidden_size=256, ffn_hidden_size=512, num_attention_heads=4,
        num_query_groups=2, kv_channels=64, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, add_qkv_bias=True,
        normalization="RMSNorm", hidden_dropout=0.0, attention_dropout=0.0, bf16=True,
        params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16,
        gradient_accumulation_fusion=False, apply_rope_fusion=fused_rope, **more,
    )  # fmt: skip
    torch.manual_seed(1)
    model = GPTModel(
        config,
        gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=1024,
        max_sequence_length=2048,
        position_embedding_type="rope",
    )
    return model.cuda().bfloat16()


def samples():
    random = np.random.default_rng(2)
    made = []
    for length in LENGTHS:
        mask = random.random(length) < 0.6
        mask[0], mask[-1] = False, True
        made.append((random.integers(0, 1024, length), mask))
    return made


def run_split(model, split):
    """Return (logits by sample, loss, gradients) of one split of the batch."""
    from megatron_fp8_ext.megatron_plugin.packed_data import packed_sequences

    data, logits, total, count = samples(), {}, 0.0, 0
    for pack in split:
        batch = batches.assemble([data[i] for i in pack], loss.infialign.weigh, LAYOUT)

        def on_gpu(array):
            return torch.from_numpy(array).cuda()[None]

        inputs = (on_gpu(batch.tokens), on_gpu(batch.positions), None)
        more = {"packed_seq_params": packed_sequences(torch.from_numpy(batch.cuts), batch.longest)}
        with torch.no_grad():
            out = model(*inputs, **more)[0]
        for place, sample in enumerate(pack):
            start = int(batch.cuts[place])
            logits[sample] = out[start : start + LENGTHS[sample]].float()
        losses = model(*inputs, labels=on_gpu(batch.labels), **more)
        part, units = loss.reduce(losses, on_gpu(batch.weights), on_gpu(batch.units))
        part.backward()
        total, count = total + part.item(), count + int(units)
    gradients = {name: p.grad.float() / count for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return logits, total / count, gradients


def alone(model, sample):
    """Logits of one sample as a plain causal batch, no THD."""
    tokens = torch.from_numpy(samples()[sample][0]).cuda()[None]
    positions = torch.arange(tokens.size(1), device="cuda")[None]
    with torch.no_grad():
        return model(tokens, positions, None)[0].float()


@pytest.mark.parametrize("fused_rope", [True, False], ids=["fused RoPE", "Megatron's RoPE"])
@pytest.mark.parametrize("name", SPLITS)
def test_bf16_packs_equal_samples_alone(group, name, fused_rope):
    model = build(fp8=False, fused_rope=fused_rope)
    logits, value, gradients = run_split(model, SPLITS[name])
    for sample in range(len(LENGTHS)):
        gap = (logits[sample] - alone(model, sample)).abs().max().item()
        print(f"{name}, sample {sample}: largest logit difference {gap:.2e}")
        assert gap < 0.05
    _, reference, theirs = run_split(model, [[i] for i in range(len(LENGTHS))])
    assert value == pytest.approx(reference, rel=2e-3)
    largest = max(g.abs().max().item() for g in theirs.values())
    for key, gradient in gradients.items():
        assert (gradient - theirs[key]).abs().max().item() < 3e-2 * largest, key


@pytest.mark.parametrize("name", SPLITS)
def test_fp8_packs_have_legal_shapes_and_agree(group, name):
    from transformer_engine.pytorch import is_fp8_block_scaling_available

    if not is_fp8_block_scaling_available():
        pytest.skip("no block-scaled FP8 on this GPU")
    model = build(fp8=True)
    _, value, gradients = run_split(model, SPLITS[name])
    _, reference, _ = run_split(model, [[i] for i in range(len(LENGTHS))])
    assert value == pytest.approx(reference, rel=2e-2)
    assert all(torch.isfinite(g).all() for g in gradients.values())


def test_a_token_of_one_sample_never_moves_another(group):
    """No cross-contamination at all: bitwise, within one pack layout."""
    model = build(fp8=False)
    before, _, _ = run_split(model, SPLITS["one pack"])
    original = samples

    def changed():
        made = original()
        made[2][0][100] = (made[2][0][100] + 1) % 1024
        return made

    globals()["samples"] = changed
    try:
        after, _, _ = run_split(model, SPLITS["one pack"])
    finally:
        globals()["samples"] = original
    assert not torch.equal(before[2], after[2])
    for sample in (0, 1, 3, 4, 5):
        assert torch.equal(before[sample], after[sample])


LOOP = "--bf16 --use-distributed-optimizer --no-gradient-accumulation-fusion".split()


@pytest.fixture(scope="module")
def bf16(sft):
    return sft(*LOOP, "--fp8-recipe", "bf16")


def agree(ours, theirs):
    assert sorted(ours.losses) == sorted(theirs.losses) == [1, 2, 3, 4, 5, 6]
    for a, b in zip(ours.iterations, theirs.iterations, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-2)


def test_infir2_trains_on_packs_through_the_loop(sft, bf16):
    outcome = sft(*LOOP, "--fp8-recipe", "infir2")
    assert "weights kept in FP8" in outcome.said[0]
    agree(outcome, bf16)
    assert outcome.losses[6] != bf16.losses[6]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--context-parallel-size 2",
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ],
    ids=["DP=2", "CP=2", "TP=2 SP"],
)
def test_every_split_of_the_batch_trains_alike(sft, bf16, flags):
    agree(sft(*LOOP, "--fp8-recipe", "bf16", *flags.split(), processes=2), bf16)
