"""Our kernels compiled for the GPU: bitwise casts, TransformerEngine's GEMMs on them, the chunked loss.

The property and edge-case tests are those of the CPU (tests/unit/test_kernel_*.py), run here compiled.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a Hopper GPU", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "unit"))

from kernel_cases import FORMATS, assert_same_cast, edge_cases, ulps_apart  # noqa: E402
from test_kernel_casts import *  # noqa: E402, F403
from test_kernel_fusions import *  # noqa: E402, F403
from test_linear_cross_entropy import (  # noqa: E402, F401
    test_frozen_sides_get_no_gradient,
    test_loss_and_gradients,
    test_main_grad_is_added_to_as_megatron_expects,
    test_masked_tokens_and_targets_outside_of_the_vocabulary,
    test_triton_softmax_is_the_torch_one,
)

from megatron_fp8_ext.benchmark import timing  # noqa: E402
from megatron_fp8_ext.fp8 import reference  # noqa: E402
from megatron_fp8_ext.fp8.error import sqnr_db  # noqa: E402
from megatron_fp8_ext.kernels import cast, rmsnorm, swiglu  # noqa: E402
from megatron_fp8_ext.kernels.linear_cross_entropy import linear_cross_entropy  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture
def te():
    pytest.importorskip("transformer_engine.pytorch", reason="needs TransformerEngine")
    from megatron_fp8_ext.megatron_plugin import te_tensor

    return te_tensor


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("shape", [(16384, 1536), (4096, 8960), (2048 + 16, 18944)])
def test_casts_of_whole_layers(shape, scale_format):
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    x *= torch.exp(2 * torch.randn(shape[1], device="cuda")).to(torch.bfloat16)
    got = cast.cast_1x128(x, scale_format)
    assert_same_cast(got.quantized(), reference.quantize_rows(x, scale_format))
    assert_same_cast(got.quantized(columns=True), reference.quantize_columns(x, scale_format))
    square = cast.cast_128x128(x, scale_format)
    assert_same_cast(square.quantized(), reference.quantize_weight(x, scale_format))


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("case", edge_cases())
@pytest.mark.parametrize("square", [False, True])
def test_memory_is_transformer_engines(te, case, scale_format, square):
    """Codes, scales and their layout, byte for byte; TE leaves what only pads undefined."""
    x = edge_cases()[case].to("cuda", torch.bfloat16)
    ours = (cast.cast_128x128 if square else cast.cast_1x128)(x, scale_format)
    theirs = te.quantizer(scale_format, square)(x)
    m, k = x.shape
    for operand, codes, scales, outer in (
        (ours.rows, theirs._rowwise_data, theirs._rowwise_scale_inv, m),
        (ours.columns, theirs._columnwise_data, theirs._columnwise_scale_inv, k),
    ):
        assert operand.codes.shape == codes.shape
        assert operand.scale_inv.shape == scales.shape
        assert torch.equal(operand.codes, codes)
        used = (m + k - outer) // 128 if square else outer
        assert torch.equal(
            operand.scale_inv[:, :used].view(torch.int32), scales[:, :used].view(torch.int32)
        )


def test_transformer_engine_gemms_take_our_casts(te):
    """fprop, dgrad and wgrad, bitwise what TE's own casts give."""
    torch.manual_seed(1)
    x = torch.randn(512, 1536, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(2048, 1536, device="cuda", dtype=torch.bfloat16) * 0.02
    dy = torch.randn(512, 2048, device="cuda", dtype=torch.bfloat16) * 1e-3
    pow2 = "power_of_two"
    ours = [
        te.blockwise(made, pow2, torch.bfloat16)
        for made in (
            cast.cast_1x128(x, pow2),
            cast.cast_128x128(w, pow2),
            cast.cast_1x128(dy, pow2),
        )
    ]
    theirs = [te.quantizer(pow2, square)(t) for t, square in ((x, False), (w, True), (dy, False))]
    exact = (x.float() @ w.float().t(), dy.float() @ w.float(), dy.float().t() @ x.float())
    for index, layout in enumerate(("TN", "NN", "NT")):
        pairs = {"TN": (1, 0), "NN": (1, 2), "NT": (0, 2)}
        a, b = pairs[layout]
        got = te.gemm(ours[a], ours[b], layout)
        assert torch.equal(got, te.gemm(theirs[a], theirs[b], layout)), layout
        assert 20 < sqnr_db(exact[index], got) < 40, layout


@pytest.mark.parametrize("m", [4096, 4096 + 48])
def test_fused_kernels_on_whole_layers(m):
    torch.manual_seed(2)
    x = torch.randn(m, 2 * 8960, device="cuda", dtype=torch.bfloat16) * 2
    dy = torch.randn(m, 8960, device="cuda", dtype=torch.bfloat16) * 1e-3
    got, _, y = swiglu.swiglu_cast(x, "power_of_two", keep=True)
    gate, up = x.float().chunk(2, dim=-1)
    assert ulps_apart(y, torch.nn.functional.silu(gate) * up) <= 1
    _check(got, y)
    got, _, dx = swiglu.swiglu_backward_cast(dy, x, "power_of_two", keep=True)
    _check(got, dx)
    h = torch.randn(m, 1536, device="cuda", dtype=torch.bfloat16) * 3
    w = torch.randn(1536, device="cuda", dtype=torch.bfloat16)
    normed = rmsnorm.rmsnorm_cast(h, w, 1e-6, "power_of_two", keep=True)
    exact = torch.nn.functional.rms_norm(h.double(), (1536,), w.double(), 1e-6)
    assert ulps_apart(normed.kept, exact.float()) <= 1
    _check(normed.cast, normed.kept)
    back = rmsnorm.rmsnorm_backward_cast(
        h.roll(1, 0), h, w, normed.rstd, "power_of_two", residual=h.roll(2, 0)
    )
    _check(back.cast, back.dx)
    again = rmsnorm.rmsnorm_backward_cast(
        h.roll(1, 0), h, w, normed.rstd, "power_of_two", residual=h.roll(2, 0)
    )
    assert torch.equal(again.dweight, back.dweight), "deterministic"


def _check(got, intermediate):
    assert_same_cast(got.quantized(), reference.quantize_rows(intermediate, "power_of_two"))
    columns = reference.quantize_columns(intermediate, "power_of_two")
    assert_same_cast(got.quantized(columns=True), columns)


@pytest.mark.parametrize("main_grad", [False, True])
def test_chunked_loss_of_a_large_vocabulary(main_grad):
    """Qwen2.5-1.5B's head, 4096 tokens: against full FP32 logits, and within 1 GB."""
    torch.manual_seed(3)
    tokens, hidden, vocabulary = 4096, 1536, 151936
    h = torch.randn(tokens, 1, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
    w = torch.randn(vocabulary, hidden, device="cuda", dtype=torch.bfloat16).mul_(0.02)
    w.requires_grad_()
    target = torch.randint(0, vocabulary, (tokens, 1), device="cuda")
    mask = (torch.rand(tokens, 1, device="cuda") > 0.3).float() / tokens
    logits = torch.matmul(h, w.t()).float()
    want = torch.nn.functional.cross_entropy(logits[:, 0], target[:, 0], reduction="none")[:, None]
    want_grads = torch.autograd.grad((want * mask).sum(), (h, w))
    want = want.detach()
    del logits
    if main_grad:
        w.main_grad = torch.zeros(w.shape, device="cuda")
        w.grad_added_to_main_grad = False
    got: list[torch.Tensor] = []

    def step() -> None:
        got.clear()
        loss = linear_cross_entropy(h, w, target)
        dh, dw = torch.autograd.grad((loss * mask).sum(), (h, w))
        got.extend((loss.detach(), dh, dw))

    peak = timing.peak_bytes(step) / 2**20
    loss, dh, dw = got
    # A gradient of the head is 445 MB; the rest is a slice of logits and an FP32 gradient of h.
    print(f"peak {peak:.0f} MB above the inputs, main_grad {main_grad}")
    assert peak < 1024
    assert ((loss - want).abs() / want).max() < 2**-7
    assert abs(loss.mean() - want.mean()) / want.mean() < 1e-5
    dw = w.main_grad if main_grad else dw
    for ours, theirs in ((dh, want_grads[0]), (dw, want_grads[1])):
        assert sqnr_db(theirs, ours) > 40
