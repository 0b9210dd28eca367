"""WSD and its lengths by hand. Equality with Megatron's scheduler is in tests/megatron/test_scheduler.py."""

from __future__ import annotations

import itertools

import pytest

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.schedule import STYLES, WSD


@pytest.mark.parametrize("style", STYLES)
def test_is_continuous_and_never_rises_after_warmup(style):
    wsd = WSD(lr=1.0, min_lr=0.1, warmup_samples=10, total_samples=100, decay_samples=40,
              decay_style=style)  # fmt: skip
    rates = [wsd.at(n) for n in range(10, 110)]
    assert all(a >= b for a, b in itertools.pairwise(rates))
    assert rates[0] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert wsd.at(wsd.decay_start) == 1.0


def test_decay_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="begins inside the warmup"):
        WSD(lr=1, min_lr=0, warmup_samples=10, total_samples=20, decay_samples=11)
