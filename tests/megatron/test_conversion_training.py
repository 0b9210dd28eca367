"""Converted checkpoints through Megatron's own loop: they load at any TP, and what is trained comes out.

Loss of the first step, before any update, on tokens that repeat: what Megatron logs is then the mean
cross-entropy of one known sequence.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hf_models
import numpy
import pytest
from conftest import ENTRY, free_port, run

pytestmark = [pytest.mark.megatron, pytest.mark.slow]
torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")
transformers = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("safetensors")

import emulated_reference  # noqa: E402

from megatron_fp8_ext.checkpoint import (  # noqa: E402
    architecture,
    compare,
    fp8,
    gguf,
    huggingface,
    layout,
    logits,
    megatron,
)
from megatron_fp8_ext.fp8 import reference  # noqa: E402

STEP = (
    "--bf16 --micro-batch-size 1 --global-batch-size 1 --lr 1e-3 --min-lr 1e-5 --lr-warmup-iters 0 "
    "--lr-decay-style constant --split 100,0,0 --eval-iters 0 --eval-interval 1000000 "
    "--log-interval 1 --save-interval 1000 --seed 1236 --use-distributed-optimizer "
    "--tokenizer-type NullTokenizer"
).split()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """(Hugging Face folder, Megatron checkpoint, its flags, 2048 tokens)."""
    where = tmp_path_factory.mktemp("qwen")
    source = hf_models.make(where / "hf", hf_models.ALIGNED)
    generator = torch.Generator().manual_seed(1)
    return prepare(where, source, torch.randint(0, 512, (2048,), generator=generator))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """The same with normalized queries and keys instead of biases."""
    where = tmp_path_factory.mktemp("qwen3")
    source = hf_models.make(where / "hf", hf_models.QWEN3)
    generator = torch.Generator().manual_seed(1)
    return prepare(where, source, torch.randint(0, 512, (2048,), generator=generator))


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """SmolLM2-135M-Instruct from its GGUF file, with 512 tokens of CPython's help."""
    from pydoc_data import topics

    from megatron_fp8_ext import tokenizer
    from megatron_fp8_ext.demo.text import tokenizer_file

    where = tmp_path_factory.mktemp("smollm")
    gguf.gguf_to_hf(tokenizer_file(), where / "hf")
    words, _ = tokenizer.load(where / "hf")
    ids = words.encode("\n\n".join(text for _, text in sorted(topics.topics.items())[:8])).ids
    return prepare(where, where / "hf", torch.tensor(ids[:512]))


def prepare(where: Path, source: Path, tokens):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    report = megatron.hf_to_megatron(source, where / "megatron")
    corpus = IndexedDatasetBuilder(str(where / "text.bin"), dtype=numpy.uint16)
    for _ in range(8):
        corpus.add_document(tokens, [len(tokens)])
    corpus.finalize(str(where / "text.idx"))
    return source, where / "megatron", report.notes[0].split(), tokens


def train(
    model,
    recipe: str,
    *flags: str,
    tp: int = 1,
    pp: int = 1,
    load: Path | None = None,
    script=ENTRY,
):
    """Train from a converted model with exactly the flags the conversion printed."""
    _, checkpoint, architecture, tokens = model
    launcher = [sys.executable]
    if tp * pp > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(tp * pp),
                     "--master-port", str(free_port())]  # fmt: skip
    where = checkpoint.parent
    outcome = run([
        *launcher, str(script), *architecture, *STEP, "--seq-length", str(len(tokens)),
        "--data-path", str(where / "text"), "--data-cache-path", str(where / "cache"),
        "--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp),
        "--fp8-recipe", recipe,
        "--load", str(load or checkpoint), *(flags or ("--train-iters", "1")),
    ])  # fmt: skip
    assert outcome.code == 0, outcome.output[-6000:]
    return outcome


def reference_loss(model, tp: int | None = None, recipe: str = "bf16") -> float:
    """Loss of the Hugging Face model; as it is, or computing as Megatron does on `tp` ranks."""
    source, _, _, tokens = model
    found = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, attn_implementation="eager"
    )
    if tp is not None:
        emulated_reference.convert(found, tp, recipe)
    return emulated_reference.loss(found, tokens)


@pytest.mark.parametrize(("name", "tp"), [("qwen", 1), ("qwen", 2), ("smollm", 3)])
def test_first_loss_is_the_hugging_face_models(name, tp, request):
    """BF16 within its rounding (2e-3 relative); infir2 within 1e-3 of the emulated reference."""
    model = request.getfixturevalue(name)
    bf16, infir2 = (train(model, recipe, tp=tp) for recipe in ("bf16", "infir2"))
    want = reference_loss(model)
    assert bf16.losses[1] == pytest.approx(want, rel=2e-3)
    emulated = reference_loss(model, tp, "infir2")
    gap = infir2.losses[1] - bf16.losses[1]
    print(
        f"{name} TP={tp}: BF16 {bf16.losses[1]:.5f} (transformers {want:.5f}), infir2 "
        f"{infir2.losses[1]:.5f} (reference {emulated:.5f}), gap {gap:+.5f} ({gap / want:+.2%})"
    )
    assert infir2.losses[1] == pytest.approx(emulated, rel=1e-3)
    assert gap != 0 and infir2.casts["weight"] > 0 and not bf16.casts


def test_qwen3_starts_at_its_own_loss(qwen3):
    """Its q_norm and k_norm are where Megatron's --qk-layernorm computes with them."""
    want = reference_loss(qwen3)
    assert train(qwen3, "bf16").losses[1] == pytest.approx(want, rel=2e-3)
    source, _, _, tokens = qwen3
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.fill_(1)
    assert abs(emulated_reference.loss(model, tokens) - want) > 1e-4, "the norms do matter"


RECORD = """
import sys, torch
from megatron_fp8_ext.fp8 import reference
from megatron_fp8_ext.megatron_plugin.pretrain_gpt import main
seen, cast = [], reference.quantize
def record(matrix, block, scale_format):
    found = cast(matrix, block, scale_format)
    if block == (128, 128) and len(seen) < 8:
        seen.append((found.codes.view(torch.uint8), found.scale_inv))
        torch.save(seen, {path!r})
    return found
reference.quantize = record
main()
"""


@pytest.fixture(scope="module")
def trained(qwen, tmp_path_factory):
    """(what 2 iterations of infir2 at TP=2 saved, the codes training casts when it goes on)."""
    where = tmp_path_factory.mktemp("trained")
    train(qwen, "infir2", "--train-iters", "2", "--save", str(where / "save"),
          "--dist-ckpt-optim-fully-reshardable", tp=2)  # fmt: skip
    script = where / "record.py"
    script.write_text(RECORD.format(path=str(where / "codes.pt")))
    train(qwen, "infir2", "--train-iters", "3", "--dist-ckpt-optim-fully-reshardable",
          "--override-opt_param-scheduler", load=where / "save", script=script)  # fmt: skip
    return where / "save", torch.load(where / "codes.pt")


def test_exported_codes_are_bitwise_those_of_training(qwen, trained, tmp_path):
    save, recorded = trained
    report = megatron.megatron_to_hf(save, tmp_path / "bf16", qwen[0])
    assert "FP32 main parameters" in report.notes[0]
    assert "training's own (TP=2)" in report.notes[1]
    fp8.hf_to_fp8(tmp_path / "bf16", tmp_path / "fp8", tensor_parallel=2)
    folder = huggingface.open_folder(tmp_path / "fp8")
    assert not compare.compare(qwen[0], tmp_path / "bf16").passes(bitwise=True), "it was trained"

    def stored(layer: int, *parts: str):
        names = [f"model.layers.{layer}.{part}.weight" for part in parts]
        codes = [folder.read(n).view(torch.uint8) for n in names]
        return codes, [folder.read(n + "_scale_inv") for n in names]

    for layer in range(2):
        qkv, proj, fc1, fc2 = recorded[4 * layer : 4 * layer + 4]
        codes, scales = stored(layer, *(f"self_attn.{x}_proj" for x in "qkv"))
        # Two groups of two query heads, a key and a value; a head is 128 rows, one row of blocks.
        grouped = [
            torch.cat([t.unflatten(0, (2, -1)) for t in part], 1) for part in (codes, scales)
        ]
        assert torch.equal(grouped[0].flatten(0, 1), qkv[0])
        assert torch.equal(grouped[1].flatten(0, 1), qkv[1])
        for parts, (want_codes, want_scales) in (
            (("self_attn.o_proj",), proj),
            (("mlp.gate_proj", "mlp.up_proj"), fc1),
            (("mlp.down_proj",), fc2),
        ):
            codes, scales = stored(layer, *parts)
            assert torch.equal(torch.cat(codes), want_codes)
            assert torch.equal(torch.cat(scales), want_scales)


def test_what_two_pipeline_stages_save_is_what_they_loaded(qwen, tmp_path):
    """With a learning rate of zero, Hugging Face -> training -> Hugging Face changes no bit."""
    train(qwen, "infir2", "--train-iters", "1", "--lr", "0", "--min-lr", "0", "--save",
          str(tmp_path / "save"), "--dist-ckpt-optim-fully-reshardable", pp=2)  # fmt: skip
    for main in (True, False):
        megatron.megatron_to_hf(
            tmp_path / "save", tmp_path / f"hf {main}", qwen[0], use_main_params=main
        )
        assert compare.compare(qwen[0], tmp_path / f"hf {main}").passes(bitwise=True)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_main_parameters_are_found_in_the_optimizers_buffers(qwen, tmp_path, tp, pp):
    """The default layout from Megatron 0.17 on names no parameter; each is found and held to its weight."""
    train(qwen, "infir2", "--train-iters", "2", "--save", str(tmp_path / "save"), tp=tp, pp=pp)
    assert layout.find(str(tmp_path / "save")).optimizer == "whole buffers"
    report = megatron.megatron_to_hf(tmp_path / "save", tmp_path / "main", qwen[0])
    assert "out of the optimizer's buffers" in report.notes[0]
    megatron.megatron_to_hf(tmp_path / "save", tmp_path / "weights", qwen[0], use_main_params=False)
    assert compare.compare(tmp_path / "main", tmp_path / "weights").passes(bitwise=True)
    assert not compare.compare(qwen[0], tmp_path / "main").passes(bitwise=True), "it was trained"


def test_model_weights_and_main_parameters_agree_where_nothing_was_gathered_in_fp8(
    qwen, trained, tmp_path
):
    megatron.megatron_to_hf(trained[0], tmp_path / "main", qwen[0])
    report = megatron.megatron_to_hf(
        trained[0], tmp_path / "weights", qwen[0], use_main_params=False
    )
    assert "which are the BF16 that training casts" in report.notes[0]
    assert compare.compare(tmp_path / "main", tmp_path / "weights").passes(bitwise=True)
    assert compare.compare(trained[0], tmp_path / "main", qwen[0]).passes(bitwise=True)


def test_transformers_loads_the_fp8_folder(qwen, trained, tmp_path):
    """Its FP8 loader on the CPU (dequantize) gives the weights and logits of `fp8-to-hf`."""
    pytest.importorskip("accelerate")
    megatron.megatron_to_hf(trained[0], tmp_path / "bf16", qwen[0])
    fp8.hf_to_fp8(tmp_path / "bf16", tmp_path / "fp8")
    fp8.fp8_to_hf(tmp_path / "fp8", tmp_path / "back")
    config = transformers.FineGrainedFP8Config(dequantize=True)
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(
        tmp_path / "fp8", quantization_config=config, dtype=torch.bfloat16
    )
    ours = auto.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    want = ours.state_dict()
    assert theirs.state_dict().keys() == want.keys()
    assert all(torch.equal(value, want[name]) for name, value in theirs.state_dict().items())
    tokens = qwen[3][None, :64]
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, ours(tokens).logits)
        # `verify --prompt` fills a model by itself, from the FP8 folder.
        assert torch.equal(
            logits.load_model(tmp_path / "fp8", ())(tokens).logits, ours(tokens).logits
        )
    # And what it computes is close to the BF16 model, not to noise.
    bf16 = auto.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.nn.functional.cosine_similarity(
            ours(tokens).logits.flatten().float(), bf16(tokens).logits.flatten().float(), dim=0
        ) > 0.99  # fmt: skip


def test_smollm_round_trip_and_answers(smollm, tmp_path):
    """The real model: bit for bit through Megatron, and FP8 that still speaks English."""
    source, checkpoint, _, _ = smollm
    megatron.megatron_to_hf(checkpoint, tmp_path / "back", source)
    assert (tmp_path / "back/model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()
    fp8.hf_to_fp8(tmp_path / "back", tmp_path / "fp8")
    folder = huggingface.open_folder(tmp_path / "fp8")
    arch = architecture.from_config(folder.config, "config.json")
    assert fp8.fp8_share(folder, arch) >= 0.95
    fp8.fp8_to_hf(tmp_path / "fp8", tmp_path / "deq")
    assert compare.compare(tmp_path / "fp8", tmp_path / "deq").passes(bitwise=True)
    text = "The capital of France is Paris, and the capital of Italy is Rome."
    result = logits.compare(source, tmp_path / "deq", text)
    assert result.mean_kl < 0.05 and result.same_choice > 0.8
    same = logits.compare(source, checkpoint, text)
    assert same.max_error == 0


def test_gguf_weights_are_dequantized_by_the_formats_own_rule(smollm):
    """Against the gguf package, whose names and query row order differ."""
    gguf_package = pytest.importorskip("gguf")
    from megatron_fp8_ext.demo.text import tokenizer_file

    folder = huggingface.open_folder(smollm[0])
    reader = gguf_package.GGUFReader(tokenizer_file())
    found = {t.name: t for t in reader.tensors if t.name.startswith(("blk.7.", "output_norm"))}
    for theirs, ours in (
        ("blk.7.ffn_down.weight", "model.layers.7.mlp.down_proj.weight"),
        ("blk.7.attn_v.weight", "model.layers.7.self_attn.v_proj.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ):
        tensor = found[theirs]
        value = torch.from_numpy(gguf_package.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(folder.read(ours), value.to(torch.bfloat16)), theirs
    assert folder.config["rms_norm_eps"] == 1e-5
    settings = json.loads((smollm[0] / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>" and "im_start" in settings["chat_template"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm[0])
    assert tokenizer.decode(tokenizer("2024 apples, naïve").input_ids) == "2024 apples, naïve"
    message = [{"role": "user", "content": "Hi"}]
    assert "<|im_start|>user\nHi<|im_end|>" in tokenizer.apply_chat_template(
        message, tokenize=False
    )


def test_reference_quantizer_is_the_one_training_uses():
    """On a CPU `hf_to_fp8` casts with training's function itself, not a copy."""
    assert fp8.choose_cast(torch.device("cpu")) == (reference.quantize_weight, "torch")
