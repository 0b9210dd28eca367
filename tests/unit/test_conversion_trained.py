"""What training saves: FP32 main parameters, dequantized FP8 weights, older layouts."""

from __future__ import annotations

import math
import pickle
import sys
import types
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other
pytest.importorskip("safetensors", reason="the reference implementation of the format")
import hf_models  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from megatron_fp8_ext.checkpoint import (  # noqa: E402
    architecture,
    compare,
    fp8,
    huggingface,
    mapping,
    megatron,
    torch_dist,
    torch_dist_writer,
)
from megatron_fp8_ext.errors import UserError  # noqa: E402
from megatron_fp8_ext.fp8 import reference  # noqa: E402


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a folder, read by the safetensors package."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


# --- A checkpoint as FP8 training saves it: weights dequantized, FP32 main parameters beside them.


def trained(path: Path, source: Path, main_params: str | None, seed: int = 1):
    """Write one, and return the FP32 main parameters under Megatron's names, by (name, layer)."""
    folder = huggingface.open_folder(source)
    arch = architecture.from_config(folder.config, "config.json")
    path.mkdir()
    writer = torch_dist_writer.TorchDistWriter(path / "iter_0000007")
    generator = torch.Generator().manual_seed(seed)
    main = {}
    for unit in mapping.units(arch):
        fused = unit.row.layout.join([folder.read(n) for n in unit.hf], arch).float()
        fused *= 1 + 0.003 * torch.rand(fused.shape, generator=generator)
        if unit.row.fp8:
            round_down_to_224(fused)
        main[unit.megatron, unit.layer] = fused
        weight = fused.to(torch.bfloat16)
        if unit.row.fp8:
            weight = reference.quantize_weight(weight, "power_of_two").dequantize(torch.bfloat16)
        writer.tensor(unit.megatron, weight, unit.layer, arch.num_layers)
        if main_params is not None:
            name = f"optimizer.state.{main_params}.{unit.megatron}"
            writer.tensor(name, fused, unit.layer, arch.num_layers)
    arguments = arch.megatron_arguments() | {"fp8_param_gather": True, "fp8": "e4m3"}
    writer.finish(arguments)
    (path / "latest_checkpointed_iteration.txt").write_text("7")
    return arch, main


def round_down_to_224(weight: torch.Tensor) -> None:
    """Make the top left block's maximum one that rounds down to a power-of-two times 224.

    225 / 224 x 2^-11: its code is 224 with the multiplier 2^11, but the maximum of the dequantized
    block, 224 x 2^-11, takes the multiplier 2^12.
    """
    block = weight[:128, :128]
    block.clamp_(-0.09, 0.09)
    block[0, 0] = 225 * 2.0**-11


def fused_codes(folder: Path, arch, unit, layout=mapping.join_qkv):
    """Codes and scales of an FP8 folder in the layout of the fused Megatron weight."""
    got = tensors(folder)
    codes = [got[name].view(torch.uint8) for name in unit.hf]
    scales = [got[name + "_scale_inv"] for name in unit.hf]
    if len(unit.hf) == 3:  # interleave heads, of 128 rows each: one row of blocks
        groups = arch.num_query_groups
        scales = [s.reshape(groups, -1, s.shape[-1]) for s in scales]
        return mapping.join_qkv(codes, arch), torch.cat(scales, dim=1).flatten(0, 1)
    return torch.cat(codes), torch.cat(scales)


@pytest.mark.parametrize("main_params", ["fp32_param", "param"])
def test_codes_are_those_of_the_main_parameters(tmp_path, main_params):
    source = hf_models.make(tmp_path / "hf", hf_models.ALIGNED)
    arch, main = trained(tmp_path / "trained", source, main_params)
    report = megatron.megatron_to_hf(tmp_path / "trained", tmp_path / "bf16", source)
    assert "FP32 main parameters, rounded to BF16" in report.notes[0]
    assert "FP8 codes will be bitwise equal" in report.notes[1]
    fp8.hf_to_fp8(tmp_path / "bf16", tmp_path / "fp8")
    for unit in mapping.units(arch):
        if not unit.row.fp8:
            continue
        # What training casts: the fused weight, rounded to BF16.
        want = reference.quantize_weight(
            main[unit.megatron, unit.layer].to(torch.bfloat16), "power_of_two"
        )
        codes, scales = fused_codes(tmp_path / "fp8", arch, unit)
        assert torch.equal(codes, want.codes.view(torch.uint8)), unit
        assert torch.equal(scales, want.scale_inv), unit


def test_without_main_parameters_values_are_equal_and_some_codes_doubled(tmp_path):
    source = hf_models.make(tmp_path / "hf", hf_models.ALIGNED)
    arch, main = trained(tmp_path / "trained", source, None)
    report = megatron.megatron_to_hf(tmp_path / "trained", tmp_path / "bf16", source)
    assert "doubled codes and a halved scale" in report.notes[0]
    fp8.hf_to_fp8(tmp_path / "bf16", tmp_path / "fp8")
    doubled = 0
    for unit in mapping.units(arch):
        if not unit.row.fp8:
            continue
        want = reference.quantize_weight(
            main[unit.megatron, unit.layer].to(torch.bfloat16), "power_of_two"
        )
        codes, scales = fused_codes(tmp_path / "fp8", arch, unit)
        got = reference.Quantized(codes.view(torch.float8_e4m3fn), scales, (128, 128))
        assert torch.equal(got.dequantize(), want.dequantize()), "values are bitwise equal"
        ratio = want.scale_inv / scales
        assert set(ratio.flatten().tolist()) <= {1.0, 2.0}
        assert ratio[0, 0] == 2.0, "the block made for it"
        block = want.codes[:128, :128].float()
        assert torch.equal(got.codes[:128, :128].float(), 2 * block)
        doubled += int((ratio == 2).sum())
    assert doubled >= 8
    # The other way round: with main parameters at hand one may still ask for the weights.
    trained(tmp_path / "both", source, "param")
    report = megatron.megatron_to_hf(
        tmp_path / "both", tmp_path / "same", source, use_main_params=False
    )
    assert "not asked for" in report.notes[0]
    assert compare.compare(tmp_path / "bf16", tmp_path / "same").passes(bitwise=True)
    # And verify tells values from codes.
    megatron.megatron_to_hf(tmp_path / "both", tmp_path / "main", source)
    fp8.hf_to_fp8(tmp_path / "main", tmp_path / "fp8 of main")
    result = compare.compare(tmp_path / "fp8 of main", tmp_path / "fp8")
    assert all(row.bitwise for row in result.rows) and not result.passes(bitwise=True)
    assert sum(row.codes is False for row in result.rows) >= 8


def test_megatron_0_14_flattened_main_parameters(tmp_path, monkeypatch):
    """Its distributed optimizer cuts a parameter into boxes, flattens them and splits them over ranks."""
    source = hf_models.make(tmp_path / "hf", hf_models.ALIGNED | hf_models.UNTIED)
    arch, main = trained(tmp_path / "trained", source, "fp32_param")
    folder = tmp_path / "trained" / "iter_0000007"
    flatten_optimizer(folder, monkeypatch)
    stored = torch_dist.TorchDist(folder)
    name = "decoder.layers.mlp.linear_fc1.weight"
    flat = stored.tensors[f"optimizer.state.fp32_param.{name}"]
    assert flat.fragments == (2, 2, 1) and flat.shape == (2, 1024, 256)
    assert torch.equal(stored.read(flat.name, 1), main[name, 1])
    report = megatron.megatron_to_hf(tmp_path / "trained", tmp_path / "bf16", source)
    assert "FP32 main parameters" in report.notes[0]
    got = tensors(tmp_path / "bf16")
    for unit in mapping.units(arch):
        want = unit.row.layout.split(main[unit.megatron, unit.layer].to(torch.bfloat16), arch)
        for tensor, hf in zip(want, unit.hf, strict=True):
            assert torch.equal(got[hf], tensor), hf


def flatten_optimizer(folder: Path, monkeypatch) -> None:
    """Rewrite the optimizer's tensors as core_v0.14 stores them at DP=2 (fully_sharded_model_space).

    The same layout was read from a checkpoint that megatron-core 0.14.0 itself had written.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        MetadataIndex,
        TensorStorageMetadata,
    )

    module = types.ModuleType("megatron.core.dist_checkpointing.strategies.torch")
    plan = type("MCoreSavePlan", (), {"__module__": module.__name__})
    module.MCoreSavePlan = plan
    monkeypatch.setitem(sys.modules, module.__name__, module)
    stored = torch_dist.TorchDist(folder)
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    metadata.mcore_data = {}
    with (folder / "__1_0.distcp").open("wb") as data:
        for name in [n for n in stored.tensors if n.startswith("optimizer.")]:
            whole = stored.read(name)
            cut = [1] * whole.dim()
            if "layers" in name:
                cut[0] = whole.shape[0]
            if "linear_fc1.weight" in name:
                cut[1] = 2  # gate and up
            entry = metadata.state_dict_metadata[name]
            for key in [k for k in metadata.storage_data if k.fqn == name]:
                del metadata.storage_data[key]
            sizes = [n // c for n, c in zip(whole.shape, cut, strict=True)]
            count, chunks = math.prod(sizes), []
            for at in (
                torch.cartesian_prod(*(torch.arange(c) for c in cut)).reshape(-1, len(cut)).tolist()
            ):
                box = whole[
                    tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, sizes, strict=True))
                ].reshape(-1)
                seam = count // 3  # two ranks, unequal shares
                for lo, hi in ((0, seam), (seam, count)):
                    offsets, shape = torch.Size([*at, lo]), torch.Size([*[1] * len(at), hi - lo])
                    start = data.tell()
                    torch.save(box[lo:hi].clone().reshape(shape), data)
                    chunks.append(ChunkStorageMetadata(offsets, shape))
                    info = _StorageInfo("__1_0.distcp", start, data.tell() - start)
                    metadata.storage_data[MetadataIndex(name, offsets)] = info
            metadata.mcore_data[name] = {"nd_reformulated_orig_global_shape": tuple(whole.shape)}
            metadata.state_dict_metadata[name] = TensorStorageMetadata(
                entry.properties, torch.Size([*cut, count]), chunks
            )
    metadata.all_local_plans = [plan()]
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)


def test_layers_stored_by_number(tmp_path):
    """Non-homogeneous checkpoints name each layer; a mixture is refused."""
    source = hf_models.make(tmp_path / "hf", hf_models.ODD)
    folder = huggingface.open_folder(source)
    arch = architecture.from_config(folder.config, "config.json")
    for mixed in (False, True):
        path = tmp_path / f"numbered {mixed}"
        path.mkdir()
        writer = torch_dist_writer.TorchDistWriter(path / "release")
        for unit in mapping.units(arch):
            value = unit.row.layout.join([folder.read(n) for n in unit.hf], arch)
            if mixed and "linear_fc2" in unit.megatron:
                writer.tensor(unit.megatron, value, unit.layer, arch.num_layers)
                continue
            name = unit.megatron.replace("decoder.layers.", f"decoder.layers.{unit.layer}.")
            writer.tensor(name, value)
        writer.finish(arch.megatron_arguments())
        (path / "latest_checkpointed_iteration.txt").write_text("release")
    megatron.megatron_to_hf(tmp_path / "numbered False", tmp_path / "back", source)
    assert compare.compare(source, tmp_path / "back").passes(bitwise=True)
    with pytest.raises(UserError, match=r"both stacked .* and by number"):
        megatron.megatron_to_hf(tmp_path / "numbered True", tmp_path / "no", source)


def test_vocabulary_padding_is_cut(tmp_path):
    source = hf_models.make(tmp_path / "hf", hf_models.ODD | hf_models.UNTIED)
    folder = huggingface.open_folder(source)
    arch = architecture.from_config(folder.config, "config.json")
    (tmp_path / "padded").mkdir()
    writer = torch_dist_writer.TorchDistWriter(tmp_path / "padded" / "iter_0000001")
    for unit in mapping.units(arch):
        value = unit.row.layout.join([folder.read(n) for n in unit.hf], arch)
        if unit.row.layout is mapping.VOCABULARY:
            value = torch.cat([value, torch.full((12, 192), 7.0, dtype=torch.bfloat16)])
        writer.tensor(unit.megatron, value, unit.layer, arch.num_layers)
    writer.finish({})
    report = megatron.megatron_to_hf(
        tmp_path / "padded" / "iter_0000001", tmp_path / "back", source
    )
    assert "stores no arguments" in " ".join(report.notes)
    assert compare.compare(source, tmp_path / "back").passes(bitwise=True)
