"""Run by test_sft.py in a process of its own: a pack against each sample alone, in FP32, as JSON.

Stock: Megatron's own local attention over one right-padded dense batch, its gradient by plain torch.
Packed: our attention, packs, and Megatron's PackedSeqParams, in one pack and in several.
"""

from __future__ import annotations

import json
import os

import numpy as np


def main() -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    from megatron_fp8_ext.megatron_plugin import import_hook, run

    run.current.wants_cpu = True
    import_hook.install()
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.transformer import TransformerConfig

    from megatron_fp8_ext.megatron_plugin.packed_data import packed_sequences
    from megatron_fp8_ext.packing import batches
    from megatron_fp8_ext.sft import loss

    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4,
        num_query_groups=2, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, add_qkv_bias=True, normalization="RMSNorm", hidden_dropout=0.0,
        attention_dropout=0.0, use_cpu_initialization=True, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, bias_activation_fusion=False,
    )  # fmt: skip
    torch.manual_seed(1)
    model = GPTModel(
        config,
        gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=300,
        max_sequence_length=256,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
    random = np.random.default_rng(2)
    samples = []
    for length in (17, 3, 40, 1 + 8, 25, 2):
        mask = random.random(length) < 0.6
        mask[0], mask[-1] = False, length != 25  # and one sample without any response
        samples.append((random.integers(0, 300, length), mask if length != 25 else mask & False))

    def gradients() -> dict:
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        return found

    # Stock: one dense batch, padded on the right; token mean by hand.
    size = 64
    tokens, labels = torch.zeros(2, len(samples), size, dtype=torch.int64).unbind(0)
    masks = torch.zeros(len(samples), size)
    for row, (ids, mask) in enumerate(samples):
        tokens[row, : len(ids)] = torch.from_numpy(ids)
        labels[row, : len(ids) - 1] = torch.from_numpy(ids[1:])
        masks[row, : len(ids) - 1] = torch.from_numpy(mask[1:]).float()
    positions = torch.arange(size).expand_as(tokens)
    causal = torch.triu(torch.ones(size, size, dtype=torch.bool), 1)[None, None]
    losses = model(tokens, positions, causal, labels=labels)
    stock_loss = (losses * masks).sum() / masks.sum()
    stock_loss.backward()
    stock = gradients()
    logits = model(tokens, positions, causal)
    largest = max(float(g.abs().max()) for g in stock.values())

    result = {"stock loss": stock_loss.item(), "gradient": largest, "splits": {}}
    groups = {
        "one pack": [[0, 1, 2, 3, 4, 5]],
        "three packs": [[5, 2], [0, 4], [3, 1]],
        "one each": [[i] for i in range(6)],
        "empty packs": [[0, 1, 2], [], [3, 4, 5], []],
        "a pack without responses": [[4], [0, 1, 2, 3, 5]],
    }
    layout = batches.Layout(capacity=128, multiple=32, ranks=1, batch=6)
    for name, split in groups.items():
        total, count, worst = 0.0, 0, 0.0
        for pack in split:
            batch = batches.assemble([samples[i] for i in pack], loss.infialign.weigh, layout)
            inputs = [torch.from_numpy(a)[None] for a in (batch.tokens, batch.positions)]
            sequences = packed_sequences(torch.from_numpy(batch.cuts), batch.longest)
            more = {"packed_seq_params": sequences}
            with torch.no_grad():
                out = model(*inputs, None, **more)[0]
            for place, sample in enumerate(pack):
                start, length = int(batch.cuts[place]), len(samples[sample][0])
                gap = out[start : start + length] - logits[sample, :length]
                worst = max(worst, float(gap.abs().max()))
            losses = model(*inputs, None, labels=torch.from_numpy(batch.labels)[None], **more)
            arrays = (torch.from_numpy(batch.weights), torch.from_numpy(batch.units))
            part, units = loss.reduce(losses, *arrays)
            part.backward()
            total, count = total + part.item(), count + int(units)
        packed = {key: grad / count for key, grad in gradients().items()}
        result["splits"][name] = {
            "loss": total / count,
            "logits": worst,
            "gradient": max(float((packed[key] - stock[key]).abs().max()) for key in stock),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
