"""The loss in slices of the vocabulary is the loss: values, both gradients, ranks, main_grad."""

from __future__ import annotations

import functools

import pytest
from kernel_cases import DEVICE, torch

from megatron_fp8_ext.kernels import linear_cross_entropy as lce
from megatron_fp8_ext.kernels import one_pass_loss, softmax, softmax_torch
from megatron_fp8_ext.kernels.one_pass_loss import one_pass_cross_entropy

S, B, H, V = 24, 2, 64, 1000


def inputs(dtype, seed=0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(S, B, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) * 0.3
    target = torch.randint(0, V, (S, B), generator=generator)
    mask = (torch.rand(S, B, generator=generator) > 0.3).float()
    made = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
    return (*made, target.to(device), (mask / 7).to(device))


def plain(hidden, weight, target):
    """Megatron's own order: logits in the dtype of the model, everything after in FP32."""
    logits = torch.matmul(hidden, weight.t()).float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), target.flatten(), reduction="none"
    ).view(target.shape)


def one_pass(hidden, weight, target, rows=None, mask=None, **more):
    """The other implementation, called like the first; `rows` are tokens."""
    return one_pass_cross_entropy(hidden, weight, target, mask, tokens=rows, **more)


@pytest.mark.parametrize("loss_of", [lce.linear_cross_entropy, one_pass])
@pytest.mark.parametrize("rows", [None, 1, 128, 333, V])
@pytest.mark.parametrize(
    ("dtype", "loss_error", "grad_error"),
    [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-5, 6e-3)],
    ids=["fp32", "bf16"],
)
def test_loss_and_gradients(dtype, loss_error, grad_error, rows, loss_of):
    hidden, weight, target, mask = inputs(dtype)
    told: list[bool] = []
    more = {}
    if loss_of is one_pass:
        more = {"mask": mask * 7, "otherwise": lambda: told.append(True)}
    loss = loss_of(hidden, weight, target, rows=rows, **more)
    assert loss.shape == (S, B) and loss.dtype == torch.float32
    want = plain(hidden, weight, target)
    # BF16 slices may round a logit differently from the whole product, by one step of BF16.
    bound = loss_error if dtype == torch.float32 else 2**-7
    assert ((loss - want).abs() / want).max() < bound
    assert abs((loss * mask).sum() - (want * mask).sum()) / want.sum() < loss_error * 50
    got = torch.autograd.grad((loss * mask).sum(), (hidden, weight))
    for ours, theirs in zip(
        got, torch.autograd.grad((want * mask).sum(), (hidden, weight)), strict=True
    ):
        assert ours.dtype == dtype
        difference = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert difference < grad_error
    assert not told


@pytest.mark.parametrize("mask", [None, "wrong"])
def test_one_pass_of_tokens_that_weigh_otherwise(mask):
    """Any loss per token is exact; the caller hears that the gradients were made twice."""
    hidden, weight, target, weights = inputs(torch.float32)
    told: list[bool] = []
    wrong = torch.ones_like(weights) if mask else None
    loss = one_pass(hidden, weight, target, mask=wrong, otherwise=lambda: told.append(True))
    want = torch.autograd.grad((plain(hidden, weight, target) * weights).sum(), (hidden, weight))
    got = torch.autograd.grad((loss * weights).sum(), (hidden, weight))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert told == [True]


def test_one_pass_without_any_token_that_counts():
    hidden, weight, target, _ = inputs(torch.bfloat16)
    nothing = torch.zeros(S, B, device=DEVICE)
    loss = one_pass(hidden, weight, target, mask=nothing)
    for gradient in torch.autograd.grad((loss * nothing).sum(), (hidden, weight)):
        assert not gradient.any()


def test_one_pass_slices_fit_the_budget():
    size = one_pass_loss.slice_size(16384, 151936, 2)
    assert size == 4096 and size * 151936 * 2 <= one_pass_loss.SLICE_BYTES
    assert one_pass_loss.slice_size(5000, 151936, 2) == 2560, "equal slices"
    assert one_pass_loss.slice_size(40, 512, 2) == 40


def test_masked_tokens_and_targets_outside_of_the_vocabulary():
    hidden, weight, target, _ = inputs(torch.float32)
    target[3, 1] = -100
    mask = torch.ones_like(target, dtype=torch.float32)
    mask[3, 1] = 0
    loss = lce.linear_cross_entropy(hidden, weight, target, rows=100)
    logits = (hidden[3, 1] @ weight.t()).detach()
    outside = torch.logsumexp(logits, 0) - logits.max()
    assert loss[3, 1].item() == pytest.approx(outside.item(), rel=1e-5)
    dh, _ = torch.autograd.grad((loss * mask).sum(), (hidden, weight))
    assert not dh[3, 1].any() and dh[3, 0].any()


def test_frozen_sides_get_no_gradient():
    hidden, weight, target, _ = inputs(torch.float32)
    loss = lce.linear_cross_entropy(hidden.detach(), weight, target).sum()
    loss.backward()
    assert weight.grad is not None and hidden.grad is None
    weight.grad = None
    lce.linear_cross_entropy(hidden, weight.detach(), target).sum().backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not lce.linear_cross_entropy(hidden, weight, target).requires_grad


@pytest.mark.parametrize("loss_of", [lce.linear_cross_entropy, one_pass])
@pytest.mark.parametrize("tied", [False, True])
def test_main_grad_is_added_to_as_megatron_expects(tied, loss_of):
    hidden, weight, target, mask = inputs(torch.bfloat16)
    want = torch.autograd.grad((plain(hidden, weight, target) * mask).sum(), weight)[0].float()
    weight.main_grad = torch.ones(V, H, device=DEVICE)
    weight.grad_added_to_main_grad = False
    weight.zero_out_wgrad = tied
    loss = loss_of(hidden, weight, target, rows=30)
    (loss * mask).sum().backward()
    assert weight.grad_added_to_main_grad
    assert (weight.main_grad - 1 - want).norm() / want.norm() < 6e-3
    if tied:
        assert not weight.grad.any()


def test_shapes_are_checked():
    hidden, weight, target, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"target must be \[24, 2\]"):
        lce.linear_cross_entropy(hidden, weight, target.t())
    with pytest.raises(ValueError, match="does not go with hidden"):
        lce.linear_cross_entropy(hidden, weight.bfloat16(), target)


def test_slices_fit_the_budget():
    size = lce.slice_size(16384, 151936, 2)
    assert size == 8192 and 16384 * size * 2 <= lce.SLICE_BYTES
    assert lce.slice_size(16, 512, 2) == 512
    assert lce.slice_size(10**7, 151936, 2) == 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_softmax_is_the_torch_one(dtype):
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(9, 700, generator=generator) * 8).to(DEVICE, dtype)
    logits[2, 5] = -torch.inf
    target = torch.randint(0, 1400, (9,), generator=generator).to(DEVICE)
    results = []
    for module in (softmax, softmax_torch):
        state = [torch.full((9,), fill, device=DEVICE) for fill in (-torch.inf, 0.0, 0.0)]
        for first in (0, 700):
            module.statistics(logits, target, *state, first)
        lse = state[0] + torch.log(state[1])
        gradient = logits.clone()
        module.gradient(gradient, target, lse, torch.linspace(0, 1, 9, device=DEVICE), 700)
        results.append((*state, gradient.float()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6
        )


def _rank(rank, port, sequence_parallel, dtype, one):
    import torch.distributed as dist

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    hidden, weight, target, mask = inputs(dtype, device="cpu")
    part = weight.detach().chunk(2)[rank].clone().requires_grad_()
    mine = hidden.detach().chunk(2)[rank].clone() if sequence_parallel else hidden.detach().clone()
    mine.requires_grad_()
    parallel = {"group": dist.group.WORLD, "sequence_parallel": sequence_parallel}
    if one:
        loss = one_pass(mine, part, target, rows=20, mask=mask, **parallel)
    else:
        loss = lce.linear_cross_entropy(mine, part, target, rows=130, **parallel)
    want = plain(hidden, weight, target)
    (loss * mask).sum().backward()
    dh, dw = torch.autograd.grad((want * mask).sum(), (hidden, weight))
    dh = dh.chunk(2)[rank] if sequence_parallel else dh
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, theirs in ((loss, want), (mine.grad, dh), (part.grad, dw.chunk(2)[rank])):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < tolerance, float(error)
    dist.destroy_process_group()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_vocabulary_over_two_ranks(sequence_parallel):
    from conftest import free_port

    for dtype, one in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        torch.multiprocessing.spawn(
            functools.partial(_rank), (free_port(), sequence_parallel, dtype, one), nprocs=2
        )
