"""The fused path on a Hopper GPU: against TransformerEngine's modules, and through Megatron's loop.

pytest tests/gpu/test_fused_layer.py -m "not slow"     about 4 minutes
pytest tests/gpu/test_fused_layer.py -m slow           300 steps, about 3 minutes
"""

from __future__ import annotations

import contextlib
import statistics
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a Hopper GPU", allow_module_level=True)
te = pytest.importorskip("transformer_engine.pytorch", reason="needs TransformerEngine")

from fused_cases import EPS, linear, random, sqnr, unfused_swiglu  # noqa: E402
from transformer_engine.common.recipe import Float8BlockScaling, Format  # noqa: E402

from megatron_fp8_ext import training_log  # noqa: E402
from megatron_fp8_ext.fused.gemm import ReferenceGemm  # noqa: E402
from megatron_fp8_ext.kernels import cublaslt  # noqa: E402
from megatron_fp8_ext.kernels.cast import BlockCast, cast_1x128, cast_128x128  # noqa: E402
from megatron_fp8_ext.megatron_plugin import fused_layer, fused_rules, run, te_tensor  # noqa: E402
from megatron_fp8_ext.megatron_plugin.precision import pin_scale_format  # noqa: E402
from megatron_fp8_ext.megatron_plugin.te_gemm import TEGemm  # noqa: E402
from megatron_fp8_ext.recipe import get_recipe  # noqa: E402

pytestmark = pytest.mark.gpu
M, B, H, F, N = 512, 2, 1536, 2048, 2048
RECIPES = ("infir2", "infir2-rl")


def decibels(got, want, floor, what):
    quality = sqnr(got, want)
    print(f"{what}: {quality:.1f} dB")
    assert got.dtype == want.dtype and got.shape == want.shape and quality >= floor, what


@pytest.mark.parametrize("direct", [False, True], ids=["te", "cublaslt"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_gemm_is_the_reference(accumulate, direct):
    x, dy, w = random(M, H, seed=1), random(M, N, scale=1e-3, seed=2), random(N, H, seed=3)
    gemm, plain = TEGemm(direct), ReferenceGemm()
    assert not direct or cublaslt.reason(0) is None
    x_cast, dy_cast = (cast_1x128(t, "power_of_two") for t in (x, dy))
    w_cast = cast_128x128(w, "power_of_two")
    operand = te_tensor.blockwise(w_cast, "power_of_two", torch.bfloat16)
    bias = random(N, seed=4)
    decibels(gemm.fprop(x_cast, operand), plain.fprop(x_cast, w_cast), 45, "fprop")
    got, want = gemm.fprop(x_cast, operand, bias), plain.fprop(x_cast, w_cast, bias)
    decibels(got, want, 45, "fprop with bias")
    decibels(gemm.dgrad(dy_cast, operand), plain.dgrad(dy_cast, w_cast), 45, "dgrad")
    new = gemm.wgrad(x_cast, dy_cast, None, False)
    decibels(new, plain.wgrad(x_cast, dy_cast, None, False), 45, "wgrad")
    out = torch.full((N, H), 3.0, device="cuda")
    gemm.wgrad(x_cast, dy_cast, out, accumulate)
    want = plain.wgrad(x_cast, dy_cast, torch.full_like(out, 3.0), accumulate)
    decibels(out, want, 45, f"wgrad into FP32, accumulate {accumulate}")


@pytest.mark.parametrize("tokens", [128, 1152, 8192])
def test_cublaslt_s_product_is_te_s(tokens):
    """The same call to the bit."""
    x, dy = random(tokens, H, seed=1), random(tokens, N, scale=1e-3, seed=2)
    w_cast = cast_128x128(random(N, H, seed=3), "power_of_two")
    x_cast, dy_cast = (cast_1x128(t, "power_of_two") for t in (x, dy))
    operand = te_tensor.blockwise(w_cast, "power_of_two", torch.bfloat16)
    bias, buffers = random(N, seed=4), [torch.full((N, H), 3.0, device="cuda") for _ in range(2)]
    made = [
        (
            gemm.fprop(x_cast, operand),
            gemm.fprop(x_cast, operand, bias),
            gemm.dgrad(dy_cast, operand),
            gemm.wgrad(x_cast, dy_cast, None, False),
            gemm.wgrad(x_cast, dy_cast, buffer, True),
        )
        for gemm, buffer in zip((TEGemm(False), TEGemm(True)), buffers, strict=True)
    ]
    for te_s, ours in zip(*made, strict=True):
        assert torch.equal(te_s, ours)


@pytest.mark.parametrize("tokens", [128, 4096])
def test_every_algorithm_offered_gives_the_product(tokens):
    """Sums of FP32 in another order, rounded to BF16."""
    x_cast = cast_1x128(random(tokens, H, seed=1), "power_of_two")
    w = cast_128x128(random(N, H, seed=3), "power_of_two").rows
    want = x_cast.quantized().dequantize() @ BlockCast(w, None, True).quantized().dequantize().t()
    out = torch.empty(tokens, N, dtype=torch.bfloat16, device="cuda")
    plan = cublaslt._plan(cublaslt.problem_of(w, x_cast.rows, True, out, False, None), 0)
    for place, algorithm in enumerate(plan.offers(64)):
        cublaslt.run(plan, w, x_cast.rows, out.zero_(), None, algorithm)
        decibels(out, want.to(torch.bfloat16), 45, f"offer {place}")


@contextlib.contextmanager
def fp8(recipe):
    te_recipe = Float8BlockScaling(fp8_format=Format.E4M3)
    pin_scale_format(te_recipe, recipe.scale_format == "power_of_two")
    with te.fp8_autocast(enabled=True, fp8_recipe=te_recipe):
        yield


def megatron_like(module):
    """What Megatron's subclass adds, as far as the seam reads it."""
    module.disable_parameter_transpose_cache, module.is_first_microbatch = False, True
    module.te_quant_params, module.te_return_bias = None, False
    module.config = types.SimpleNamespace(cpu_offloading=False, cuda_graph_impl="none")
    return module


def layers(recipe, fp8_weights):
    """(norm + linear with bias, linear, fc1, fc2) with their weights in BF16 or FP8."""
    context = contextlib.nullcontext()
    if fp8_weights:
        te_recipe = Float8BlockScaling(fp8_format=Format.E4M3)
        pin_scale_format(te_recipe, recipe.scale_format == "power_of_two")
        context = te.fp8_model_init(enabled=True, recipe=te_recipe)
    common = {"params_dtype": torch.bfloat16, "device": "cuda"}
    norm = {"eps": EPS, "normalization": "RMSNorm", "parallel_mode": "column", **common}
    torch.manual_seed(3)
    with context:
        made = (
            te.LayerNormLinear(H, N, bias=True, **norm),
            te.Linear(H, H, bias=False, parallel_mode="row", **common),
            te.LayerNormLinear(H, 2 * F, bias=False, **norm),
            te.Linear(F, H, bias=False, parallel_mode="row", **common),
        )
    for module in made:
        megatron_like(module)
    return made


@pytest.fixture(params=RECIPES)
def recipe(request, monkeypatch):
    found = get_recipe(request.param)
    monkeypatch.setattr(run, "current", run.Run(recipe=found, fused=True))
    return found


def both(modules, fused, native, recipe, x, dy):
    """Compare output and gradients of a fused and a native forward on the same modules."""
    parameters = [p for m in modules for p in m.parameters() if p.numel()]
    names = [n for m in modules for n, p in m.named_parameters() if p.numel()]
    results = []
    for forward in (fused, native):
        for module in modules:
            module.is_first_microbatch = True
        leaf = x.detach().clone().requires_grad_()
        with fp8(recipe):
            y = forward(leaf)
        y.backward(dy)
        results.append((y.detach(), leaf.grad, *(p.grad.clone() for p in parameters)))
        for parameter in parameters:
            parameter.grad = None
    return list(zip(("output", "x", *names), *results, strict=True))


@pytest.mark.parametrize("fp8_weights", [False, True])
def test_norm_linear_against_te(recipe, fp8_weights):
    module, *_ = layers(recipe, fp8_weights)
    assert fused_rules.why_not(module, "norm + linear") is None
    x, dy = random(M, B, H, seed=1), random(M, B, N, scale=1e-3, seed=2)
    found = both(
        [module],
        lambda x: fused_layer._norm_linear(module, x),
        lambda x: module(x, is_first_microbatch=True),
        recipe, x, dy,
    )  # fmt: skip
    for name, got, want in found:
        decibels(got, want, 40, f"norm + linear, {name}")


@pytest.mark.parametrize("fp8_weights", [False, True])
def test_linear_against_te(recipe, fp8_weights):
    _, module, *_ = layers(recipe, fp8_weights)
    assert fused_rules.why_not(module, "linear") is None
    x, dy = random(M, B, H, seed=1), random(M, B, H, scale=1e-3, seed=2)
    found = both(
        [module],
        lambda x: fused_layer._linear(module, x),
        lambda x: module(x, is_first_microbatch=True),
        recipe, x, dy,
    )  # fmt: skip
    for name, got, want in found:
        decibels(got, want, 40, f"linear, {name}")


@pytest.mark.parametrize("stash", [False, True])
@pytest.mark.parametrize("fp8_weights", [False, True])
def test_mlp_against_te(recipe, fp8_weights, stash, monkeypatch):
    _, _, fc1, fc2 = layers(recipe, fp8_weights)
    monkeypatch.setattr(run.current, "stash", stash)
    mlp = types.SimpleNamespace(linear_fc1=fc1, linear_fc2=fc2)
    x, dy = random(M, B, H, seed=1), random(M, B, H, scale=1e-3, seed=2)

    def native(x):
        return fc2(unfused_swiglu(fc1(x, is_first_microbatch=True)), is_first_microbatch=True)

    found = both([fc1, fc2], lambda x: fused_layer._mlp(mlp, x), native, recipe, x, dy)
    for name, got, want in found:
        exact = not stash or name == "output"
        decibels(got, want, 40 if exact else 26, f"MLP, stash {stash}, {name}")


def test_mlp_twice_is_the_same_to_the_bit(recipe):
    _, _, fc1, fc2 = layers(recipe, True)
    mlp = types.SimpleNamespace(linear_fc1=fc1, linear_fc2=fc2)
    x, dy = random(M, B, H, seed=1), random(M, B, H, scale=1e-3, seed=2)

    def forward(x):
        return fused_layer._mlp(mlp, x)

    for name, first, second in both([fc1, fc2], forward, forward, recipe, x, dy):
        assert torch.equal(first, second), name


def test_memory_of_the_mlp(recipe):
    """Between forward and backward: the input, fc1's output, 4 bytes a token; nothing forgotten."""
    _, _, fc1, fc2 = layers(recipe, True)
    mlp = types.SimpleNamespace(linear_fc1=fc1, linear_fc2=fc2)
    x = random(8 * M, B, H, seed=1).requires_grad_()
    with fp8(recipe):
        fused_layer._mlp(mlp, x).sum().backward()  # workspaces, compilation
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = fused_layer._mlp(mlp, x)
        kept = torch.cuda.memory_allocated() - before
    tokens = 8 * M * B
    expected = tokens * (2 * 2 * F + 2 * H + 4)
    assert kept <= expected * 1.02, f"{kept} bytes, expected {expected}"
    y.sum().backward()


DIST = ("--use-distributed-optimizer", "--no-gradient-accumulation-fusion")
INFIR2 = ("--fp8-recipe", "infir2")
FUSED, UNFUSED = ("--infir2-fused",), ("--no-infir2-fused",)
ALL_FUSED = "fused layers: norm + linear 2 of 2, linear 2 of 2, MLP 2 of 2"


def same(ours, theirs, rel):
    assert sorted(ours.losses) == sorted(theirs.losses)
    for iteration, loss in theirs.losses.items():
        assert ours.losses[iteration] == pytest.approx(loss, rel=rel), iteration


@pytest.fixture(scope="module")
def unfused(train):
    outcome = train(*DIST, *INFIR2, *UNFUSED)
    assert not any("fused layers" in line for line in outcome.said)
    return outcome


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--infir2-stash",
        "--overlap-grad-reduce --overlap-param-gather",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "--recompute-granularity selective --recompute-modules mlp",
        "--no-fp8-param-gather",
        "--linear-cross-entropy chunked",
        "--untie-embeddings-and-output-weights --micro-batch-size 4",
    ],
    ids=lambda flags: flags.replace("--", "") or "plain",
)
def test_training(flags, train, unfused):
    outcome = train(*DIST, *INFIR2, *FUSED, *flags.split())
    assert any(ALL_FUSED in line for line in outcome.said), outcome.said
    if "untie" not in flags:
        same(outcome, unfused, rel=2e-3)


def test_a_run_may_switch_at_a_checkpoint(train, tmp_path):
    """Parameters, optimizer and the rest are the same to both paths, either way."""
    whole = train(*DIST, *INFIR2, *FUSED)
    for first, then in (FUSED, UNFUSED), (UNFUSED, FUSED):
        folder = str(tmp_path / ("to-native" if then == UNFUSED else "to-fused"))
        train(
            *DIST, *INFIR2, *first, "--save", folder, "--save-interval", "4", "--exit-interval", "4"
        )
        rest = train(*DIST, *INFIR2, *then, "--load", folder)
        assert min(rest.losses) == 5
        for own in training_log.own_losses(rest.iterations):  # 6 is logged as the mean of 5 and 6
            gap = own.loss / whole.losses[own.number] - 1
            print(f"{' '.join(then)} from iteration 5: {own.number}, {own.loss:.5f} ({gap:+.1e})")
            assert abs(gap) <= 2e-3


def test_a_first_layer_in_bf16_is_left_alone(train):
    flags = "--first-last-layers-bf16 --num-layers-at-start-in-bf16 1 --num-layers-at-end-in-bf16 0"
    outcome = train(*DIST, *INFIR2, *FUSED, *flags.split())
    assert any("norm + linear 1 of 1, linear 1 of 1, MLP 1 of 1" in line for line in outcome.said)


@pytest.mark.slow
def test_300_steps_within_the_band_of_bf16(train, tmp_path):
    """From the same weights, on the same data: losses lie as close as BF16's do over three data orders."""
    weights = str(tmp_path / "weights")
    steps = ("--train-iters", "300", "--lr-wsd-decay-iters", "100")
    train(*DIST, "--fp8-recipe", "bf16", "--train-iters", "1", "--lr", "1e-12", "--min-lr", "0",
          "--lr-wsd-decay-iters", "1", "--lr-warmup-iters", "0",
          "--save", weights, "--save-interval", "1", "--dist-ckpt-optim-fully-reshardable")  # fmt: skip
    start = ("--load", weights, "--finetune", *steps)

    def end(*flags, seed):
        outcome = train(*DIST, *start, *flags, "--seed", str(seed))
        return statistics.mean(loss for i, loss in outcome.losses.items() if i > 270)

    sides = (FUSED, UNFUSED, ("--infir2-stash",))
    with ThreadPoolExecutor(3) as pool:
        band = list(pool.map(lambda seed: end("--fp8-recipe", "bf16", seed=seed), (1, 2, 3)))
        losses = list(pool.map(lambda flags: end(*INFIR2, *flags, seed=1), sides))
    spread = max(band) - min(band)
    print(f"BF16, three data orders: {band}")
    for flags, loss in zip(sides, losses, strict=True):
        print(f"infir2 {' '.join(flags)}: {loss}, {loss - band[0]:+.4f} to BF16 on the same data")
        assert abs(loss - band[0]) <= spread


def test_the_reference_weight_is_te_s(recipe):
    """The operand of the CPU tests and the one of TransformerEngine hold the same codes."""
    module = layers(recipe, False)[1]
    from megatron_fp8_ext.megatron_plugin.te_gemm import weight_operand

    with fp8(recipe):
        module.prepare_forward(random(16, 1, H))
        operand = weight_operand(module, True)
        module.end_forward()
    want = linear(module.weight, recipe.scale_format).operand
    assert torch.equal(operand._rowwise_data, want.rows.codes)
    assert torch.equal(operand._columnwise_data, want.columns.codes)
