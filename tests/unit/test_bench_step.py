"""`megatron-fp8 bench step`: what each side runs, and what its figures become."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest
from conftest import run

from megatron_fp8_ext.benchmark import device_time, sides, step
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import step_timing

CLI = (sys.executable, "-m", "megatron_fp8_ext.cli", "bench", "step")
STEP = step.Step(
    model="m", architecture={"num-layers": "2", "swiglu": "true", "qk-layernorm": "false"},
    seq_length=128, micro_batch_size=2, micro_batches=3, iterations=2, warm_up=1,
)  # fmt: skip


def test_sides():
    stock, te, ours = sides.parse("bf16,te-blockwise,infir2+stash")
    assert stock.flags == () and stock.loss == te.loss == "Megatron's default"
    assert ours.flags[:2] == ("--fp8-recipe", "infir2") and ours.flags[-1] == "--infir2-stash"
    assert ours.loss == "one-pass"
    (plain,) = sides.parse("infir2+full-logits+unfused")
    off = ("--linear-cross-entropy", "off")
    assert plain.flags == ("--fp8-recipe", "infir2", *off, "--no-infir2-fused")
    assert plain.loss == "Megatron's default"
    assert sides.parse("infir2+graphs")[0].loss == "chunked", (
        "the host may not look at a captured loss"
    )
    (native,) = sides.parse("infir2+native-ce")
    assert "--linear-cross-entropy" not in native.flags and "native" in native.loss
    (te,) = sides.parse("bf16+te-ce")
    argv, asked = step_timing.take_te_cross_entropy(["--bf16", *te.flags])
    assert te.loss == "TransformerEngine's" and asked
    assert argv == [
        "--bf16",
        "--cross-entropy-loss-fusion",
        "--cross-entropy-fusion-impl",
        "native",
    ]
    assert step_timing.take_te_cross_entropy(argv) == (argv, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf17", "did you mean 'bf16'"),
        ("infir2+stahs", "did you mean 'stash'"),
        ("bf16+stash", "option of infir2 alone"),
        ("bf16,bf16", "names a side twice"),
        ("infir2+chunked+native-ce", "two losses"),
        ("bf16+te-ce+one-pass", "two losses"),
        (" ,", "names no side"),
    ],
)
def test_bad_sides(text, message):
    with pytest.raises(UserError, match=message):
        sides.parse(text)


def test_command():
    argv = step.command(STEP, sides.parse("infir2")[0])
    assert argv[:3] == ["--num-layers", "2", "--swiglu"] and "--qk-layernorm" not in argv
    assert argv[argv.index("--global-batch-size") + 1] == "6"
    assert argv[argv.index("--train-iters") + 1] == "3"


def record(name, forward, peak):
    rows = [
        {"forward": forward + i, "backward": 20.0, "optimizer": 5.0, "train step": 50.0,
         "loss": {"lm loss": 2.0 - i}, "counted": i > 0}
        for i in range(3)
    ]  # fmt: skip
    memory = {"forward and backward": peak, "optimizer state": 10**9, "step": peak + 1}
    return {
        "side": name, "loss": "chunked", "rows": rows, "memory": memory, "flop_step": 1e13,
        "world_size": 2, "attention": "cuDNN", "versions": {"torch": "2"},
    }  # fmt: skip


def test_table(tmp_path):
    made = [
        step.summarize(record("a", 10.0, 4 * 10**9)),
        step.summarize(record("b", 5.0, 2 * 10**9)),
    ]
    assert made[0]["times"]["forward and backward"]["median"] == 31.5
    assert made[0]["memory"]["without state"] == 3 * 10**9
    assert made[0]["tflop_s"] == pytest.approx(100)
    text = step.markdown(STEP, {"torch": "2"}, made)
    assert "| forward and backward | 31.5 (31.0 to 32.0) | 26.5 (26.0 to 27.0) [0.841] |" in text
    assert "| the same without optimizer state | 3.00 | 1.00 [0.333] |" in text
    assert "768 random tokens a step" in text and "| 2.0000 / 0.0000 | 2.0000 / 0.0000 |" in text
    skipping = dataclasses.replace(STEP, skip_optimizer=True)
    assert "its moments take no memory" in step.markdown(skipping, {"torch": "2"}, made)
    pytest.importorskip("matplotlib")
    assert step.picture(made, tmp_path / "x.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["x.svg"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--model", "qwen2.5-15b"), "did you mean 'qwen2.5-1.5b'?"),
        (("--iterations", "0"), "--iterations 0 is too small"),
        (("--compare", "fp8"), "unknown side of --compare"),
    ],
)
def test_bad_options(argv, message, tmp_path):
    done = run([*CLI, "--output", str(tmp_path / "x"), *argv])
    assert done.code == 2 and message in done.output and not list(tmp_path.iterdir())


@pytest.mark.megatron
@pytest.mark.slow
def test_a_tiny_model_on_the_cpu(tmp_path):
    small = "--model tiny --seq-length 128 --micro-batch-size 1 --micro-batches 2 --iterations 2"
    argv = [*small.split(), "--warm-up", "1", "--compare", "bf16,infir2", "--output"]
    done = run([*CLI, *argv, str(tmp_path / "x")])
    assert done.code == 0, done.output
    names = {path.name for path in tmp_path.iterdir()}
    assert {"x.json", "x.md", "x-bf16.log", "x-infir2.log"} <= names
    text = (tmp_path / "x.md").read_text()
    for part in ("layers forward", "layers backward", "optimizer"):
        assert text.count(f"| {part} | ") == 1, text


@pytest.mark.megatron
@pytest.mark.slow
def test_a_side_that_fails_is_one_line(tmp_path):
    small = "--model tiny --seq-length 128 --iterations 1 --warm-up 0 --skip-optimizer"
    small += " --compare te-blockwise"
    out = tmp_path / "x"
    done = run([*CLI, *small.split(), "--output", str(out)])
    assert done.code == 2 and "te-blockwise failed: " in done.output
    assert not (tmp_path / "x.json").exists()
    # Beside another one it does not cost that one's figures.
    done = run([*CLI, *f"{small},bf16".split(), "--output", str(out)])
    assert done.code == 2 and "te-blockwise failed: " in done.output
    text = (tmp_path / "x.md").read_text()
    assert "| | bf16 |" in text and "| backward |" in text and "| optimizer |" in text


def test_where_device_time_goes():
    kernels = [
        ("nvjet_sm90_qqtst_128x128_128x6_1x2_h_bz_coopA_algo2_Ablk128_Bvec128_TNN", 69.5, 196),
        ("nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_TNT", 10.0, 4),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", 58.8, 28),
        ("block_scaled_gemm", 1.0, 4),
        ("cast_tiles", 32.5, 252),
        ("void at::native::vectorized_elementwise_kernel<8, CUDAFunctor_add>", 5.8, 113),
        ("somebody_s_kernel", 0.5, 1),
    ]
    groups = device_time.by_group(kernels)
    assert groups["GEMM, FP8"] == (70.5, 200) and groups["GEMM, BF16"] == (10.0, 4)
    assert groups["attention"][0] == 58.8 and groups["other"] == (0.5, 1)
    assert sum(ms for ms, _ in groups.values()) == pytest.approx(178.1)
    text = device_time.markdown([("infir2", kernels), ("bf16", kernels[1:2])])
    assert "| GEMM, BF16 | 10.0 (4) | 10.0 (4) |" in text and "| all | 178.1 | 10.0 |" in text
    assert "cast_tiles" in text and "somebody_s_kernel" not in text


def test_one_iteration_more_for_the_kernels():
    more = dataclasses.replace(STEP, kernels=True)
    argv = step.command(more, sides.parse("infir2")[0])
    assert argv[argv.index("--train-iters") + 1] == "4"


def test_a_span_is_no_kernel_and_a_lambda_is():
    torch = pytest.importorskip("torch")
    cuda, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(name, us, where=cuda):
        return SimpleNamespace(
            name=name, device_type=where, time_range=SimpleNamespace(elapsed_us=lambda: us)
        )

    events = [
        event("void copy_kernel(at::TensorIteratorBase&)::{lambda(float)#1}", 500.0),
        event("Optimizer.step#FusedAdam.step", 9000.0),
        event("adam", 2000.0),
        event("adam", 1000.0),
        event("aten::add", 70.0, host),
    ]
    found = step_timing.kernels_of(SimpleNamespace(events=lambda: events))
    assert [(name.split("(")[0], ms, calls) for name, ms, calls in found] == [
        ("adam", 3.0, 2),
        ("void copy_kernel", 0.5, 1),
    ]
