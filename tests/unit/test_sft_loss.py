"""The reduction alone; the whole gradient through Megatron is in tests/megatron/test_sft.py."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from megatron_fp8_ext import registry  # noqa: E402
from megatron_fp8_ext.sft import loss  # noqa: E402


def test_zero_response_tokens_are_zero_with_zero_gradient():
    losses = torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True)
    total, count = loss.reduce(losses, torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    total.backward()
    assert (total.item(), count.item()) == (0.0, 0)
    assert torch.equal(losses.grad, torch.zeros(3))


def test_masked_tokens_cannot_poison_the_sum():
    losses = torch.tensor([2.0, float("nan"), 3.0], requires_grad=True)
    weights = torch.tensor([1.0, 0.0, 1.0])
    total, count = loss.reduce(losses, weights, weights.long())
    total.backward()
    assert (total.item(), count.item()) == (5.0, 2)
    assert losses.grad.tolist() == [1.0, 0.0, 1.0]


def test_losses_come_through_entry_points():
    assert registry.lookup("loss", "infialign") is loss.infialign
    assert {"infialign", "sample_mean"} <= set(registry.names("loss"))
