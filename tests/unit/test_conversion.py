"""Hugging Face -> Megatron -> Hugging Face is the identity; the FP8 cast is training's."""

from __future__ import annotations

import json
import math
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
)
from megatron_fp8_ext.errors import UserError  # noqa: E402
from megatron_fp8_ext.fp8 import reference  # noqa: E402

MODELS = {
    "tied": (hf_models.ALIGNED, 1),
    "untied, sharded": (hf_models.ALIGNED | hf_models.UNTIED, 3),
    "odd widths, untied": (hf_models.ODD | hf_models.UNTIED, 1),
    "odd widths, tied, sharded": (hf_models.ODD, 2),
    "llama": (hf_models.LLAMA | hf_models.UNTIED, 1),
    "qwen3": (hf_models.QWEN3, 1),
    "llama, every head its own": (hf_models.LLAMA | {"num_key_value_heads": 4}, 1),
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a folder, read by the safetensors package."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_bits(x, y) -> bool:
    return x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))


@pytest.fixture(params=MODELS, ids=str)
def model(request, tmp_path):
    config, shards = MODELS[request.param]
    return hf_models.make(tmp_path / "hf", config, shards)


def test_round_trip_is_bitwise(model, tmp_path):
    megatron.hf_to_megatron(model, tmp_path / "megatron")
    report = megatron.megatron_to_hf(
        tmp_path / "megatron", tmp_path / "back", model, shard_bytes=300_000
    )
    want, got = tensors(model), tensors(tmp_path / "back")
    assert want.keys() == got.keys() and len(got) == report.tensors
    assert all(same_bits(want[name], got[name]) for name in want)
    for name in ("tokenizer_config.json", "merges.txt"):
        assert (tmp_path / "back" / name).read_bytes() == (model / name).read_bytes()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((model / "config.json").read_text())
    files = sorted(file.name for file in (tmp_path / "back").glob("*.safetensors"))
    assert files[0].startswith("model-00001-of-"), "numbered from 1, as every reader expects"
    index = json.loads((tmp_path / "back" / huggingface.INDEX).read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in got.values())
    assert compare.compare(model, tmp_path / "megatron").passes(bitwise=True)


def test_qkv_rows_lie_where_megatron_computes_with_them(tmp_path):
    """By hand, element by element: group g holds its query heads, then its key, then its value."""
    arch = architecture.from_config(hf_models.ODD, "config.json")
    q, k, v = (
        torch.arange(n * 32, dtype=torch.float32) + at for n, at in ((6, 0), (2, 1e4), (2, 2e4))
    )
    fused = mapping.join_qkv([q, k, v], arch)
    want = []
    for group in range(2):
        for head in range(3):
            want += [(group * 3 + head) * 32 + i for i in range(32)]
        want += [1e4 + group * 32 + i for i in range(32)]
        want += [2e4 + group * 32 + i for i in range(32)]
    assert fused.tolist() == want
    assert all(
        torch.equal(a, b) for a, b in zip(mapping.split_qkv(fused, arch), (q, k, v), strict=True)
    )


@pytest.mark.parametrize("scale_format", ["e8m0", "fp32"])
def test_fp8_folder(model, tmp_path, scale_format):
    fp8.hf_to_fp8(model, tmp_path / "fp8", scale_format=scale_format, shard_bytes=400_000)
    folder = huggingface.open_folder(tmp_path / "fp8")
    arch = architecture.from_config(folder.config, "config.json")
    assert fp8.fp8_share(folder, arch) >= 0.95
    source, got = tensors(model), tensors(tmp_path / "fp8")
    rule = {"e8m0": "power_of_two", "fp32": "float32"}[scale_format]
    cast = set()
    for name, value in source.items():
        if (
            name.split(".")[-2]
            not in "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
        ):
            assert same_bits(got[name], value), name
        elif name.endswith(".bias"):
            assert same_bits(got[name], value), name
        else:
            want = reference.quantize_weight(value, rule)
            assert same_bits(got[name], want.codes)
            assert same_bits(got[name + "_scale_inv"], want.scale_inv)
            cast.add(name)
    assert set(got) == set(source) | {f"{name}_scale_inv" for name in cast}
    if scale_format == "e8m0":
        assert all(math.frexp(s)[0] == 0.5 for n in cast for s in got[f"{n}_scale_inv"].flatten())
    settings = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    kept = settings.pop("modules_to_not_convert")
    assert settings.pop("ignored_layers") == kept
    assert settings == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "scale_fmt": {"e8m0": "ue8m0", "fp32": "float"}[scale_format],
    }
    modules = {name.rpartition(".")[0] for name in source} | {"lm_head"}
    assert set(kept) == modules - {name.rpartition(".")[0] for name in cast}
    assert (tmp_path / "fp8" / "merges.txt").exists()

    fp8.fp8_to_hf(tmp_path / "fp8", tmp_path / "back")
    back = tensors(tmp_path / "back")
    assert back.keys() == source.keys()
    for name in source:
        want = source[name]
        if name in cast:
            want = reference.quantize_weight(want, rule).dequantize(torch.bfloat16)
        assert same_bits(back[name], want), name
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())


def test_partial_blocks_are_written_and_said(tmp_path):
    odd = hf_models.make(tmp_path / "odd", hf_models.ODD)
    notes = " ".join(fp8.hf_to_fp8(odd, tmp_path / "fp8").notes)
    assert "transformers cannot read this file" in notes and "SGLang and vLLM" in notes
    assert "heads of 32 rows share blocks in the fused QKV" in notes
    fine = hf_models.make(tmp_path / "fine", hf_models.ALIGNED)
    notes = " ".join(fp8.hf_to_fp8(fine, tmp_path / "fp8 of fine").notes)
    assert "cannot" not in notes and "blocks differ" not in notes
    notes = fp8.hf_to_fp8(fine, tmp_path / "tp8", tensor_parallel=8).notes
    assert any("gate_proj, up_proj, down_proj: 64 of the FFN" in note for note in notes)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_model_is_not_cast(tmp_path, value):
    folder = hf_models.make(tmp_path / "hf", hf_models.ALIGNED)
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1.mlp.down_proj.weight holds NaN or infinity"):
        fp8.hf_to_fp8(folder, tmp_path / "fp8")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_verify_measures(tmp_path):
    a = hf_models.make(tmp_path / "a", hf_models.ALIGNED)
    fp8.hf_to_fp8(a, tmp_path / "fp8")
    result = compare.compare(a, tmp_path / "fp8")
    cast = [row for row in result.rows if not row.bitwise]
    assert len(cast) == 14 and all(25 < row.sqnr_db < 40 and row.max_error > 0 for row in cast)
    assert result.passes(min_sqnr=25) and not result.passes(min_sqnr=60)
    assert "12 of 26 tensors are equal" in result.summary()[0]
    other = hf_models.make(tmp_path / "b", hf_models.ALIGNED | hf_models.UNTIED)
    with pytest.raises(UserError, match=r"lm_head.weight is in .*b and not in .*a"):
        compare.compare(a, other)


@pytest.mark.parametrize("scale_format", ["e8m0", "fp32"])
def test_the_triton_cast_gives_the_same_folder(tmp_path, scale_format):
    """Under Triton's interpreter; tests/gpu/test_conversion.py has it compiled."""
    import kernel_cases

    if kernel_cases.DEVICE != "cpu":
        pytest.skip("tests/gpu/test_conversion.py does it on the GPU")
    model = hf_models.make(tmp_path / "hf", hf_models.ODD | {"num_hidden_layers": 1})
    for name, cast in (("torch", None), ("triton", fp8.triton_cast)):
        fp8.hf_to_fp8(model, tmp_path / name, scale_format=scale_format, device="cpu", cast=cast)
    files = sorted(file.name for file in (tmp_path / "torch").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "triton").iterdir())
    for file in files:
        assert (tmp_path / "torch" / file).read_bytes() == (tmp_path / "triton" / file).read_bytes()
