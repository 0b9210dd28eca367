"""`convert hf-to-fp8` on a GPU: the compiled Triton cast writes the very files that the CPU writes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a Hopper GPU", allow_module_level=True)
pytest.importorskip("triton")
pytest.importorskip("safetensors")
import hf_models  # noqa: E402

from megatron_fp8_ext.checkpoint import compare, fp8, layout, megatron  # noqa: E402

pytestmark = pytest.mark.gpu
MODELS = {
    "aligned": hf_models.ALIGNED,
    "odd widths": hf_models.ODD | hf_models.UNTIED,
    "0.6B": hf_models.ALIGNED
    | {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "vocab_size": 65536,
    },
}


def assert_same_folder(a: Path, b: Path) -> None:
    files = sorted(file.name for file in a.iterdir())
    assert files == sorted(file.name for file in b.iterdir())
    for file in files:
        assert (a / file).read_bytes() == (b / file).read_bytes(), file


@pytest.mark.parametrize("scale_format", ["e8m0", "fp32"])
@pytest.mark.parametrize("name", MODELS)
def test_the_folder_is_the_cpus_bit_for_bit(tmp_path, name, scale_format):
    source = hf_models.make(tmp_path / "hf", MODELS[name])
    fp8.hf_to_fp8(source, tmp_path / "warm", scale_format=scale_format, device="cuda")
    for device in ("cpu", "cuda"):
        began = time.monotonic()
        report = fp8.hf_to_fp8(source, tmp_path / device, scale_format=scale_format, device=device)
        print(
            f"{name} {scale_format} {device}: {report.nbytes / 1e9:.2f} GB in "
            f"{time.monotonic() - began:.2f} s, {report.gigabytes_per_second:.2f} GB/s"
        )
        by = {"cpu": "torch", "cuda": "Triton"}[device]
        assert f"cast on {device} by {by};" in report.notes[0]
    assert_same_folder(tmp_path / "cpu", tmp_path / "cuda")


def test_every_block_of_a_real_range(tmp_path):
    """Weights over BF16's whole range of exponents: zero blocks, subnormals, 224 and 448 times a power."""
    source = hf_models.make(tmp_path / "hf", hf_models.ALIGNED)
    from safetensors.torch import load_file, save_file

    state = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, value in state.items():
        if value.dim() == 2:
            exponents = torch.randint(-140, 100, (value.shape[0], 1), generator=generator)
            wide = value.float() * torch.exp2(exponents.float())
            wide[:128, :128] = 0
            wide[0, 128] = 225 * 2.0**-11
            state[name] = wide.to(torch.bfloat16)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    for scale_format in ("e8m0", "fp32"):
        for device in ("cpu", "cuda"):
            out = tmp_path / f"{device} {scale_format}"
            fp8.hf_to_fp8(source, out, scale_format=scale_format, device=device)
        assert_same_folder(tmp_path / f"cpu {scale_format}", tmp_path / f"cuda {scale_format}")


def test_main_parameters_out_of_fp8_buffers(tmp_path):
    """Stock flags leave two buffers, FP8 weights in one: their values are those of the saved weights."""
    pytest.importorskip("transformer_engine.pytorch", reason="needs TransformerEngine")
    from test_conversion_training import prepare, train

    source = hf_models.make(tmp_path / "hf", hf_models.ALIGNED)
    tokens = torch.randint(0, 512, (2048,), generator=torch.Generator().manual_seed(1))
    train(
        prepare(tmp_path, source, tokens), "blockwise", "--fp8-format", "e4m3", "--fp8-param-gather",
        "--no-gradient-accumulation-fusion", "--train-iters", "2", "--save", str(tmp_path / "save"),
    )  # fmt: skip
    found = layout.find(str(tmp_path / "save"))
    assert found.optimizer == "whole buffers" and found.fp8_params
    for main in (True, False):
        report = megatron.megatron_to_hf(
            tmp_path / "save", tmp_path / f"bf16 {main}", source, use_main_params=main
        )
        assert ("out of the optimizer's buffers" in report.notes[0]) is main
        fp8.hf_to_fp8(tmp_path / f"bf16 {main}", tmp_path / f"fp8 {main}")
    result = compare.compare(tmp_path / "fp8 True", tmp_path / "fp8 False")
    assert all(row.bitwise for row in result.rows), "values, though codes may be doubled"


def test_main_parameters_start_from_the_checkpoints_values(tmp_path):
    """Weights alone, kept in FP8: FP32 main parameters are the file's, not what FP8 left of them."""
    pytest.importorskip("transformer_engine.pytorch", reason="needs TransformerEngine")
    from test_conversion_training import prepare, train

    source = hf_models.make(tmp_path / "hf", hf_models.ALIGNED)
    tokens = torch.randint(0, 512, (2048,), generator=torch.Generator().manual_seed(1))
    # A step too small to move a BF16 value.
    outcome = train(
        prepare(tmp_path, source, tokens), "infir2", "--no-gradient-accumulation-fusion",
        "--use-distributed-optimizer", "--lr", "1e-12", "--min-lr", "0", "--train-iters", "1",
        "--save", str(tmp_path / "save"),
    )  # fmt: skip
    assert any("--load-main-params-from-ckpt" in line for line in outcome.said)
    report = megatron.megatron_to_hf(tmp_path / "save", tmp_path / "back", source)
    assert "FP32 main parameters" in report.notes[0]
    assert compare.compare(source, tmp_path / "back").passes(bitwise=True)
