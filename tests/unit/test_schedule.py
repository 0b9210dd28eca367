"""schedule.WSD equals Megatron's OptimizerParamScheduler, step for step."""

from __future__ import annotations

import itertools
import types

import pytest

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.schedule import WSD

STYLES = ("cosine", "linear", "exponential", "minus_sqrt")


@pytest.mark.megatron
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("warmup", "total", "decay"), [(10, 100, 30), (0, 50, 50), (5, 20, 1)])
def test_equals_megatron(style, warmup, total, decay):
    pytest.importorskip("torch")
    module = pytest.importorskip("megatron.core.optimizer_param_scheduler")
    group = {"lr": 0.0, "weight_decay": 0.0, "params": []}
    theirs = module.OptimizerParamScheduler(
        types.SimpleNamespace(param_groups=[group]),
        init_lr=1e-6, max_lr=1e-3, min_lr=1e-5, lr_warmup_steps=warmup, lr_decay_steps=total,
        lr_decay_style="WSD", start_wd=0.1, end_wd=0.1, wd_incr_steps=total,
        wd_incr_style="constant", wsd_decay_steps=decay, lr_wsd_decay_style=style,
    )  # fmt: skip
    ours = WSD(
        lr=1e-3, min_lr=1e-5, init_lr=1e-6, warmup_samples=warmup, total_samples=total,
        decay_samples=decay, decay_style=style,
    )  # fmt: skip
    for _ in range(total + 5):
        assert ours.at(theirs.num_steps) == theirs.get_lr(group)
        theirs.step(1)


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
