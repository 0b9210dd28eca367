"""Fused functions against the unfused emulated layers: outputs, gradients, and the codes in between."""

from __future__ import annotations

import pytest
from fused_cases import (
    EPS,
    linear,
    parameter,
    random,
    setup,
    sqnr,
    unfused_linear,
    unfused_mlp,
    unfused_norm,
    unfused_swiglu,
)
from kernel_cases import DEVICE, torch

from megatron_fp8_ext.fp8 import reference
from megatron_fp8_ext.fused.linear import cast_linear, norm_linear
from megatron_fp8_ext.fused.mlp import Block, mlp

M, B, H, F = 64, 2, 256, 256  # 128 tokens
BOTH = ("power_of_two", pytest.param("float32", marks=pytest.mark.slow))


def leaves(*seeds):
    x = random(M, B, H, seed=seeds[0]).requires_grad_()
    gain = torch.nn.Parameter(1 + random(H, scale=0.1, seed=seeds[0] + 1))
    return x, gain


def gradients(y, inputs, dy):
    return torch.autograd.grad(y, inputs, dy)


def close(got, want, names, floor=40.0):
    for name, mine, theirs in zip(names, got, want, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, name
        assert sqnr(mine, theirs) >= floor, f"{name}: {sqnr(mine, theirs):.1f} dB"


def same_operand(operand, want):
    """A GEMM operand in TransformerEngine's layout against the specification, bit for bit."""
    outer, inner = operand.codes.shape
    assert torch.equal(operand.codes, want.codes.view(torch.uint8))
    scales = operand.scale_inv.t()[:outer, : -(-inner // 128)]
    assert torch.equal(scales, want.scale_inv)


@pytest.mark.parametrize("scale_format", BOTH)
def test_norm_linear(scale_format):
    x, gain = leaves(1)
    weight, bias = parameter(320, H, seed=3), parameter(320, scale=0.5, seed=4)
    dy = random(M, B, 320, scale=1e-3, seed=5)
    inputs = (x, gain, weight, bias)
    how = setup(scale_format)
    y = norm_linear(x, gain, EPS, linear(weight, scale_format), bias, how)
    want = unfused_linear(unfused_norm(x, gain), weight, bias, scale_format)
    close([y], [want], ["output"])
    got = gradients(y, inputs, dy)
    close(got, gradients(want, inputs, dy), ["x", "gain", "weight", "bias"])

    n = unfused_norm(x, gain).detach().view(-1, H)
    (_, rows), (_, dy_rows), (_, columns, dy_columns) = how.gemm.seen
    same_operand(rows, reference.quantize_rows(n, scale_format))
    same_operand(columns, reference.quantize_columns(n, scale_format))
    flat = dy.view(-1, 320)
    same_operand(dy_rows, reference.quantize_rows(flat, scale_format))
    same_operand(dy_columns, reference.quantize_columns(flat, scale_format))


@pytest.mark.parametrize("scale_format", BOTH)
def test_cast_linear(scale_format):
    x, weight = leaves(1)[0], parameter(192, H, seed=3)
    dy = random(M, B, 192, scale=1e-3, seed=5)
    y = cast_linear(x, linear(weight, scale_format), setup(scale_format))
    want = unfused_linear(x, weight, None, scale_format)
    close([y], [want], ["output"])
    close(gradients(y, (x, weight), dy), gradients(want, (x, weight), dy), ["x", "weight"])


def mlp_case(scale_format, stash=False):
    x, gain = leaves(1)
    w1, w2 = parameter(2 * F, H, seed=3), parameter(H, F, seed=4)
    how = setup(scale_format)
    block = Block(linear(w1, scale_format), linear(w2, scale_format), EPS, how, stash)
    return x, gain, w1, w2, block


MLP_NAMES = ["x", "gain", "fc1", "fc2"]


@pytest.mark.parametrize("scale_format", BOTH)
def test_mlp(scale_format):
    x, gain, w1, w2, block = mlp_case(scale_format)
    inputs, dy = (x, gain, w1, w2), random(M, B, H, scale=1e-3, seed=5)
    y = mlp(x, gain, block)
    want = unfused_mlp(x, gain, w1, w2, scale_format)
    close([y], [want], ["output"])
    close(gradients(y, inputs, dy), gradients(want, inputs, dy), MLP_NAMES)

    n = unfused_norm(x, gain).detach().view(-1, H)
    z = unfused_swiglu(unfused_linear(n, w1.detach(), None, scale_format))
    fc1, fc2, dgrad2, wgrad2, dgrad1, wgrad1 = block.setup.gemm.seen
    same_operand(fc1[1], reference.quantize_rows(n, scale_format))
    same_operand(wgrad1[1], reference.quantize_columns(n, scale_format))
    same_operand(fc2[1], reference.quantize_rows(z, scale_format))
    same_operand(wgrad2[1], reference.quantize_columns(z, scale_format))
    flat = dy.view(-1, H)
    same_operand(dgrad2[1], reference.quantize_rows(flat, scale_format))
    same_operand(wgrad2[2], reference.quantize_columns(flat, scale_format))
    assert dgrad1[1].codes.shape == (M * B, 2 * F) and wgrad1[2].codes.shape == (2 * F, M * B)


@pytest.mark.parametrize("scale_format", BOTH)
def test_mlp_with_stash(scale_format):
    x, gain, w1, w2, block = mlp_case(scale_format, stash=True)
    inputs, dy = (x, gain, w1, w2), random(M, B, H, scale=1e-3, seed=5)
    y = mlp(x, gain, block)
    want = unfused_mlp(x, gain, w1, w2, scale_format)
    close([y], [want], ["output"])
    got, expected = gradients(y, inputs, dy), gradients(want, inputs, dy)
    close(got, expected, MLP_NAMES, floor=26.0)
    # It does touch them: the gradient of fc1 is not the one without.
    assert sqnr(got[2], expected[2]) < 60


@pytest.mark.parametrize("stash", [False, True])
def test_what_is_kept(stash):
    """The bytes that live between forward and backward, beside the input and the weights."""
    x, gain, _, _, block = mlp_case("power_of_two", stash)
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in (x.data_ptr(), gain.data_ptr()):
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp(x, gain, block)
    tokens = M * B
    one = 1 + 2 / 32  # a code and its share of a scale
    fc1 = tokens * 2 * F * (one if stash else 2)
    assert sum(kept) == tokens * 4 + fc1


def test_without_gradients_nothing_is_kept_and_the_result_is_the_same():
    x, gain, _, _, block = mlp_case("power_of_two")
    with torch.no_grad():
        quiet = mlp(x, gain, block)
        qkv = norm_linear(x, gain, EPS, block.fc1, None, block.setup)
        proj = cast_linear(x, block.fc1, block.setup)
    assert quiet.grad_fn is None
    assert torch.equal(quiet, mlp(x, gain, block))
    assert torch.equal(qkv, norm_linear(x, gain, EPS, block.fc1, None, block.setup))
    assert torch.equal(proj, cast_linear(x, block.fc1, block.setup))


def with_main_grad(*weights):
    for weight in weights:
        weight.main_grad = torch.full(weight.shape, 2.0, dtype=torch.float32, device=DEVICE)
        weight.grad_added_to_main_grad = False


@pytest.mark.parametrize("accumulate", [False, True])
def test_gradients_go_to_main_grad(accumulate):
    x, gain, w1, w2, block = mlp_case("power_of_two")
    dy = random(M, B, H, scale=1e-3, seed=5)
    _, _, want1, want2 = gradients(mlp(x, gain, block), (x, gain, w1, w2), dy)
    with_main_grad(w1, w2)
    block = Block(
        linear(w1, "power_of_two", accumulate),
        linear(w2, "power_of_two", accumulate),
        EPS,
        block.setup,
    )
    mlp(x, gain, block).backward(dy)
    for weight, want in ((w1, want1), (w2, want2)):
        assert weight.grad_added_to_main_grad and weight.grad.shape == weight.shape
        got = weight.main_grad - (2.0 if accumulate else 0.0)
        assert sqnr(got, want) > 40
        # FP32: not rounded to BF16 on the way, as `want` is.
        assert not torch.equal(got.to(torch.bfloat16).float(), got)


def test_a_layer_used_twice_in_the_first_micro_batch():
    x, weight = leaves(1)[0], parameter(H, H, seed=3)
    first = linear(weight, "power_of_two", accumulate=False)
    later = linear(weight, "power_of_two", accumulate=True)
    how, dy = setup("power_of_two"), random(M, B, H, scale=1e-3, seed=5)
    want = [gradients(cast_linear(x, first, how), weight, dy)[0] for _ in range(2)]
    with_main_grad(weight)
    # Autograd goes backwards: the one that may overwrite comes last.
    (cast_linear(x, first, how) + cast_linear(x, later, how)).backward(dy)
    assert sqnr(weight.main_grad - 2, want[0].float() + want[1].float()) > 40


def test_gradients_of_gain_and_bias_go_to_main_grad():
    """They are only ever added: Megatron zeroes the buffer."""
    x, gain, w1, _, block = mlp_case("power_of_two")
    bias, dy = parameter(w1.shape[0], seed=7), random(M, B, w1.shape[0], scale=1e-3, seed=5)

    def backward():
        norm_linear(x, gain, EPS, block.fc1, bias, block.setup).backward(dy)

    backward()
    want = [parameter.grad.clone() for parameter in (gain, bias)]
    with_main_grad(gain, bias)
    for times in (1, 2):
        gain.grad = bias.grad = None
        backward()
        for each, once in zip((gain, bias), want, strict=True):
            assert each.grad_added_to_main_grad and each.grad.shape == each.shape
            got = each.main_grad - 2.0
            torch.testing.assert_close(got, times * once.float(), rtol=2**-7, atol=1e-6)
            assert not torch.equal(got.to(torch.bfloat16).float(), got)
    # Where the buffer is to be overwritten, and by a data parallelism that does not know, it is returned.
    gain.overwrite_main_grad = True
    del bias.grad_added_to_main_grad
    gain.grad = bias.grad = None
    before = [each.main_grad.clone() for each in (gain, bias)]
    backward()
    for each, once, untouched in zip((gain, bias), want, before, strict=True):
        assert torch.equal(each.grad, once) and torch.equal(each.main_grad, untouched)


@pytest.mark.slow
def test_special_buffers():
    x, gain, w1, w2, block = mlp_case("power_of_two")
    dy = random(M, B, H, scale=1e-3, seed=5)
    _, _, want1, want2 = gradients(mlp(x, gain, block), (x, gain, w1, w2), dy)
    with_main_grad(w1, w2)
    w1.overwrite_main_grad, w2.zero_out_wgrad = True, True
    mlp(x, gain, block).backward(dy)
    assert sqnr(w1.main_grad, want1) > 40 and sqnr(w2.main_grad - 2, want2) > 40
    assert not w2.grad.any()  # autograd will add the embedding's gradient to it
    # A data parallelism that does not know `grad_added_to_main_grad` gets a gradient.
    del w1.grad_added_to_main_grad
    w1.grad = None
    before = w1.main_grad.clone()
    mlp(x, gain, block).backward(dy)
    assert torch.equal(w1.main_grad, before) and torch.equal(w1.grad, want1)


@pytest.mark.slow
def test_frozen_weights():
    x, gain, w1, w2, block = mlp_case("power_of_two")
    w1.requires_grad_(False)
    w2.requires_grad_(False)
    dy = random(M, B, H, scale=1e-3, seed=5)
    got = gradients(mlp(x, gain, block), (x, gain), dy)
    want = gradients(unfused_mlp(x, gain, w1, w2, "power_of_two"), (x, gain), dy)
    close(got, want, MLP_NAMES[:2])
    assert [call[0] for call in block.setup.gemm.seen] == ["fprop", "fprop", "dgrad", "dgrad"]


@pytest.mark.slow
def test_recomputed_it_is_the_same():
    """torch's checkpoint runs the forward without gradients, and again with them."""
    x, gain, w1, w2, block = mlp_case("power_of_two")
    dy, inputs = random(M, B, H, scale=1e-3, seed=5), (x, gain, w1, w2)
    again = torch.utils.checkpoint.checkpoint(lambda x: mlp(x, gain, block), x, use_reentrant=False)
    plain = mlp(x, gain, block)
    assert torch.equal(again, plain)
    for mine, theirs in zip(
        gradients(again, inputs, dy), gradients(plain, inputs, dy), strict=True
    ):
        assert torch.equal(mine, theirs)
