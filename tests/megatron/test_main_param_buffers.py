"""FP32 main parameters out of the distributed optimizer's default layout, laid out by Megatron's own rule.

FP8 training on a GPU leaves two buffers, one of its FP8 weights; the rest is what CPU training leaves too
(tests/megatron/test_conversion_training.py reads that from real runs).
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.megatron
torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")
pytest.importorskip("safetensors")
torch.set_num_threads(1)
import hf_models  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from test_conversion_trained import fused_codes, round_down_to_224  # noqa: E402

from megatron_fp8_ext.checkpoint import (  # noqa: E402
    architecture,
    fp8,
    huggingface,
    mapping,
    megatron,
    torch_dist_writer,
)
from megatron_fp8_ext.errors import UserError  # noqa: E402
from megatron_fp8_ext.fp8 import reference  # noqa: E402

if not hasattr(DistributedOptimizer, "_compute_per_buffer_param_layout"):
    pytest.skip("the rule has another place in this Megatron", allow_module_level=True)

# TransformerEngine's modules and Megatron's local ones, spelled out from their sources.
TE_LAYER = (
    "self_attention.linear_proj.weight self_attention.linear_qkv.layer_norm_weight "
    "self_attention.linear_qkv.weight self_attention.linear_qkv.bias mlp.linear_fc1.layer_norm_weight "
    "mlp.linear_fc1.weight mlp.linear_fc2.weight"
).split()
LOCAL_LAYER = [TE_LAYER[1], TE_LAYER[0], *TE_LAYER[2:]]


def shard(name: str, value: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    """What a tensor-parallel rank holds of a parameter."""
    if "norm" in name:
        return value
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(tp)[rank] for half in value.chunk(2)])
    axis = 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
    return value.chunk(tp, dim=axis)[rank]


def write(
    path: Path,
    source: Path,
    tp: int = 1,
    stages: int = 1,
    dp: int = 1,
    bucket: int | None = None,
    layer: list[str] = TE_LAYER,
    gathered: bool = True,
    change=None,
):
    """Write such a checkpoint; return the architecture and the main parameters by (name, layer)."""
    folder = huggingface.open_folder(source)
    arch = architecture.from_config(folder.config, "config.json")
    path.mkdir()
    writer = torch_dist_writer.TorchDistWriter(path / "iter_0000007")
    generator = torch.Generator().manual_seed(5)
    main = {}
    for unit in mapping.units(arch):
        fused = unit.row.layout.join([folder.read(n) for n in unit.hf], arch).float()
        fused *= 1 + 0.003 * torch.rand(fused.shape, generator=generator)
        if unit.row.fp8:
            round_down_to_224(fused)
        main[unit.megatron, unit.layer] = fused
        weight = fused.to(torch.bfloat16)
        if unit.row.fp8 and gathered:
            weight = reference.quantize_weight(weight, "power_of_two").dequantize(torch.bfloat16)
        writer.tensor(unit.megatron, weight, unit.layer, arch.num_layers)
    if change is not None:
        change(main)
    fp8_names = {unit.megatron for unit in mapping.units(arch) if unit.row.fp8}
    embedding = ("embedding.word_embeddings.weight", None)
    each = arch.num_layers // stages
    for stage in range(stages):
        keys = [embedding] if stage == 0 else []
        for number in range(stage * each, (stage + 1) * each):
            keys += [(f"decoder.layers.{name}", number) for name in layer]
        if stage == stages - 1:
            keys.append(("decoder.final_layernorm.weight", None))
            if not arch.tied:
                keys.append(("output_layer.weight", None))
            elif stages > 1:
                keys.append(embedding)
        keys = [key for key in keys if key in main]
        groups = [("bfloat16", keys)]
        if gathered:
            groups = [
                (dtype, [key for key in keys if (key[0] in fp8_names) == (dtype == "uint8")])
                for dtype in ("bfloat16", "uint8")
            ]
        for rank in range(tp):
            for at, (dtype, chosen) in enumerate(groups):
                values = [shard(key[0], main[key], rank, tp) for key in chosen]
                prefix = (
                    f"optimizer.distributed.dp_group_idx_{stage * tp + rank}.gbuf_idx_{at}"
                    f".dtype_(torch.{dtype}, torch.float32)"
                )
                shared = {
                    n
                    for n, key in enumerate(chosen)
                    if key == embedding and arch.tied and stages > 1
                }
                store(writer, prefix, values, bucket, dp, shared)
    writer.finish(
        arch.megatron_arguments()
        | {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": stages,
            "fp8_param_gather": gathered,
        }
    )
    (path / "latest_checkpointed_iteration.txt").write_text("7")
    return arch, main


def store(writer, prefix: str, values, bucket: int | None, dp: int, shared: set[int]) -> None:
    """Write a buffer as `sharded_param_state_dp_reshardable` does: a piece for each part and gap."""
    params = [torch.nn.Parameter(value.contiguous()) for value in values]
    for n in shared:
        params[n].shared_embedding = True
    config = SimpleNamespace(pad_buckets_for_high_nccl_busbw=False)
    layout = DistributedOptimizer._compute_per_buffer_param_layout(params, bucket, dp, config)
    for number, (first, last) in enumerate(layout.bucket_indices):
        name = f"{prefix}.bucket_idx_{number}.param"
        unpadded = layout.per_bucket_numel_unpadded[number]
        flat = torch.full((last - first,), math.nan)
        cuts = {0, unpadded, *range(0, last - first, (last - first) // dp)}
        for param in params:
            start, stop, of = layout.param_index_map[param]
            if of == number:
                flat[start - first : stop - first] = param.detach().reshape(-1)
                cuts |= {start - first, stop - first}
        edges = sorted(cut for cut in cuts if cut <= unpadded)
        writer._shapes[name] = (torch.float32, (unpadded,))
        for lo, hi in itertools.pairwise(edges):
            writer._chunks.setdefault(name, []).append(((lo,), (hi - lo,)))
            writer._append(name, (lo,), flat[lo:hi].clone())


CASES = {
    "one rank": {},
    "three data-parallel ranks": {"dp": 3},
    "small buckets": {"bucket": 150_000, "dp": 2},
    "TP=2": {"tp": 2},
    "TP=2, PP=2, untied": {"tp": 2, "stages": 2, "untied": True, "dp": 2},
    "PP=2, tied": {"stages": 2, "bucket": 150_000, "dp": 2},
    "not gathered in FP8, Megatron's own layers": {
        "gathered": False,
        "layer": LOCAL_LAYER,
        "dp": 2,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_codes_are_those_of_the_main_parameters(tmp_path, case):
    options = dict(CASES[case])
    untied = hf_models.UNTIED if options.pop("untied", False) else {}
    source = hf_models.make(tmp_path / "hf", hf_models.ALIGNED | untied)
    arch, main = write(tmp_path / "trained", source, **options)
    report = megatron.megatron_to_hf(tmp_path / "trained", tmp_path / "bf16", source)
    assert "FP32 main parameters (out of the optimizer's buffers" in report.notes[0]
    back = huggingface.open_folder(tmp_path / "bf16")
    fp8.hf_to_fp8(tmp_path / "bf16", tmp_path / "fp8")
    for unit in mapping.units(arch):
        want = main[unit.megatron, unit.layer].to(torch.bfloat16)
        parts = unit.row.layout.split(want, arch)
        for name, part in zip(unit.hf, parts, strict=True):
            assert torch.equal(back.read(name), part), name
        if unit.row.fp8:
            cast = reference.quantize_weight(want, "power_of_two")
            codes, scales = fused_codes(tmp_path / "fp8", arch, unit)
            assert torch.equal(codes, cast.codes.view(torch.uint8)), unit
            assert torch.equal(scales, cast.scale_inv), unit


def test_what_does_not_fit_is_not_read(tmp_path):
    """Another order of modules: the note says so and what to set; the weights are converted."""
    source = hf_models.make(tmp_path / "hf", hf_models.ALIGNED)
    write(tmp_path / "trained", source, layer=[*TE_LAYER[5:], *TE_LAYER[:5]])
    report = megatron.megatron_to_hf(tmp_path / "trained", tmp_path / "bf16", source)
    assert "main parameters are whole buffers without names, and" in report.notes[0]
    assert "--dist-ckpt-optim-fully-reshardable" in report.notes[0]


def test_main_parameters_of_another_state_are_refused(tmp_path):
    source = hf_models.make(tmp_path / "hf", hf_models.ALIGNED)

    def change(main):
        main["decoder.layers.mlp.linear_fc2.weight", 1][3, 7] += 0.5

    write(tmp_path / "trained", source, tp=2, change=change)
    with pytest.raises(UserError, match=r"linear_fc2.weight, layer 1.*--no-main-params"):
        megatron.megatron_to_hf(tmp_path / "trained", tmp_path / "bf16", source)
    assert not (tmp_path / "bf16").exists()
    megatron.megatron_to_hf(tmp_path / "trained", tmp_path / "bf16", source, use_main_params=False)
