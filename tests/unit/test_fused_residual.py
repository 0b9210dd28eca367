"""The residual inside the GEMM and the norm's backward: the same sums, wherever the shorter way is taken."""

from __future__ import annotations

import gc
import weakref

import pytest
from fused_cases import EPS, linear, parameter, random, setup, sqnr
from kernel_cases import torch
from torch.utils.checkpoint import checkpoint

from megatron_fp8_ext.fused import residual
from megatron_fp8_ext.fused.linear import cast_linear, norm_linear
from megatron_fp8_ext.fused.mlp import Block, mlp

M, B, H, F = 64, 2, 128, 128
# A rounding more or less flips codes of E4M3 in the layers before (31 dB each); one left out leaves 5 dB.
FLOOR = 24


class Model:
    """A layer as Megatron puts it together: x + proj(tanh(qkv(x))), then x + mlp(x)."""

    def __init__(self):
        how = setup("power_of_two")
        self.gain = torch.nn.Parameter(1 + random(H, scale=0.1, seed=2))
        self.weights = [parameter(H, H, seed=s) for s in (3, 4)]
        self.weights += [parameter(2 * F, H, seed=5), parameter(H, F, seed=6)]
        self.qkv, self.proj, fc1, fc2 = (linear(w, "power_of_two") for w in self.weights)
        self.block, self.how = Block(fc1, fc2, EPS, how), how

    def attention(self, x):
        inner = torch.tanh(norm_linear(x, self.gain, EPS, self.qkv, None, self.how))
        past = residual.expected_by("attention")
        y = cast_linear(inner, self.proj, self.how, past)
        return y if past is None else residual.done(y)

    def mlp(self, x):
        add = residual.expected_by("mlp") is x
        y = mlp(x, self.gain, self.block, add)
        return residual.done(y) if add else y

    def __call__(self, x, add, through=lambda f, x: f(x)):
        x = add(through(self.attention, x), x)
        return add(through(self.mlp, x), x)

    def announced(self, x, add):
        """The same, with a layer that says what it adds."""
        with residual.follows("attention", x):
            x = add(self.attention(x), x)
        with residual.follows("mlp", x):
            return add(self.mlp(x), x)


def gradients(model, add, announced=False, **kwargs):
    source = random(M, B, H, seed=1).requires_grad_()
    y = (model.announced if announced else model)(source * 1, add, **kwargs)
    inputs = [source, model.gain, *model.weights]
    for tensor in inputs:
        tensor.grad = None
    y.backward(random(M, B, H, scale=1e-3, seed=9))
    return y, [tensor.grad for tensor in inputs]


def plain(x, past):
    return past + x


@pytest.fixture
def taken(monkeypatch):
    """How many sums took the shorter way."""
    seen, native = [], residual.Branch.take

    def take(self):
        gradient = native(self)
        seen.append(gradient is not None)
        return gradient

    monkeypatch.setattr(residual.Branch, "take", take)
    return seen


def test_gradients_are_those_of_plain_sums(taken):
    model = Model()
    want_y, want = gradients(model, plain)
    assert not any(taken)
    taken.clear()
    y, got = gradients(model, residual.add)
    assert taken == [True, True]
    assert torch.equal(y, want_y)
    for mine, theirs in zip(got, want, strict=True):
        assert sqnr(mine, theirs) > FLOOR


def test_the_gemm_adds_the_residual(taken):
    """One rounding where there were two; the gradients take the shorter way too."""
    model = Model()
    want_y, want = gradients(model, plain)
    taken.clear()
    y, got = gradients(model, residual.add, announced=True)
    assert taken == [True]  # the attention's; the MLP's own backward has the gradient
    assert FLOOR < sqnr(y.detach(), want_y.detach()) < 90
    for mine, theirs in zip(got, want, strict=True):
        assert sqnr(mine, theirs) > FLOOR
    with torch.no_grad():
        x = random(M, B, H, seed=1)
        assert torch.equal(model.announced(x, plain), model(x, plain))


def test_a_residual_added_and_added_again_is_said():
    model, x = Model(), random(M, B, H, seed=1).requires_grad_() * 1
    with pytest.raises(RuntimeError, match="did not ask for that sum"), residual.follows("mlp", x):
        plain(model.mlp(x), x)
    # Not this module's, not the whole input: nothing is added.
    with residual.follows("mlp", x):
        assert torch.equal(model.attention(x), Model().attention(x))
        half = x[: M // 2]
        assert residual.add(mlp(half, model.gain, model.block), half) is not None


def test_one_rounding_where_there_were_two():
    """The sum in FP32 before the rounding: nearer to the truth than BF16 plus BF16."""
    x = random(M, B, H, seed=1).requires_grad_()
    model, dy = Model(), random(M, B, H, seed=9)

    def of(add):
        source = x * 1
        return torch.autograd.grad(add(model.mlp(source), source), x, dy)[0]

    branch = torch.autograd.grad(model.mlp(x), x, dy)[0]
    fused, separate = of(residual.add), of(plain)
    assert torch.equal(separate, branch + dy)
    apart = (fused.float() - separate.float()).abs()
    assert 0 < (apart > 0).float().mean() < 0.5
    assert (apart <= 2.0**-7 * separate.float().abs() + 2.0**-8 * branch.float().abs()).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_of_a_branch_or_of_a_layer(taken, reentrant):
    """A branch recomputed: a plain sum, for its graph is not the sum's. A whole layer: as without."""
    model = Model()
    _, want = gradients(model, plain)
    taken.clear()

    def again(function, x):
        return checkpoint(function, x, use_reentrant=reentrant)

    _, got = gradients(model, residual.add, through=again)
    for mine, theirs in zip(got, want, strict=True):
        assert sqnr(mine, theirs) > FLOOR
    assert any(taken) is not reentrant

    source = random(M, B, H, seed=1).requires_grad_()
    y = checkpoint(lambda x: model(x, residual.add), source * 1, use_reentrant=reentrant)
    taken.clear()
    dy = random(M, B, H, scale=1e-3, seed=9)
    torch.autograd.backward(y, dy)
    assert taken.count(True) >= 1
    assert sqnr(source.grad, want[0]) > FLOOR


def test_only_the_sum_with_the_norm_s_own_input_takes_it(taken):
    model, source = Model(), random(M, B, H, seed=1).requires_grad_()
    x, other = source * 1, source * 2
    dy = random(M, B, H, scale=1e-3, seed=9)
    got = torch.autograd.grad(residual.add(model.mlp(x), other), source, dy)[0]
    want = torch.autograd.grad(model.mlp(source * 1) + source * 2, source, dy)[0]
    assert torch.equal(got, want) and not any(taken)
    # A leaf: nobody else adds to its gradient.
    got = torch.autograd.grad(residual.add(model.mlp(source), source), source, dy)[0]
    assert not any(taken) and sqnr(got, want - dy) > 20


def test_used_twice_and_backward_twice():
    model, source = Model(), random(M, B, H, seed=1).requires_grad_()
    dy = random(M, B, H, scale=1e-3, seed=9)

    def of(add):
        x = source * 1
        y = add(model.mlp(x), x) + 3 * x  # the input has a third user
        first = torch.autograd.grad(y, source, dy, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(y, source, dy)[0])
        return first

    assert sqnr(of(residual.add), of(plain)) > 40


def test_a_sum_that_does_not_depend_on_the_norm_is_said():
    model, source = Model(), random(M, B, H, seed=1).requires_grad_()
    x = source * 1
    branch = model.mlp(x)
    wrong = residual.add(source * 3, x)
    with pytest.raises(RuntimeError, match="did not reach the norm"):
        torch.autograd.grad(branch, source, torch.ones_like(branch))
    del wrong


class Same(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.clone())
    backward = staticmethod(lambda ctx, grad: grad)


def test_the_graph_is_let_go():
    model, source = Model(), random(M, B, H, seed=1).requires_grad_()
    x = Same.apply(source)
    node = weakref.ref(x.grad_fn)
    y = model.mlp(x)
    del x, y
    gc.collect()
    assert node() is None
