"""Run by test_scheduler.py under each Megatron: our WSD against its OptimizerParamScheduler."""

from __future__ import annotations

import types

import megatron.core
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_fp8_ext.schedule import STYLES, WSD

compared = 0


@st.composite
def schedules(draw: st.DrawFn) -> tuple[WSD, int]:
    """A schedule and the samples of an iteration; warmup, decay or both may be absent."""
    size = draw(st.integers(1, 64))
    warmup = draw(st.integers(0, 40)) * size
    stable = draw(st.integers(0, 40)) * size
    decay = draw(st.integers(0, 40)) * size
    if warmup + stable + decay == 0 or stable + decay == 0:
        stable = size
    lr = draw(st.floats(1e-7, 1.0))
    return (
        WSD(
            lr=lr,
            min_lr=draw(st.floats(0.0, 1.0)) * lr,
            init_lr=draw(st.floats(0.0, 1.0)) * lr,
            warmup_samples=warmup,
            total_samples=warmup + stable + decay,
            decay_samples=decay,
            decay_style=draw(st.sampled_from(STYLES)),
        ),
        size,
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(schedules())
def equal_at_every_step(case: tuple[WSD, int]) -> None:
    global compared
    ours, size = case
    groups = [
        {"lr": 0.0, "weight_decay": 0.0, "params": [], "max_lr": ours.lr, "min_lr": ours.min_lr},
        {"lr": 0.0, "weight_decay": 0.0, "params": []},
    ]
    theirs = OptimizerParamScheduler(
        types.SimpleNamespace(param_groups=groups),
        init_lr=ours.init_lr,
        max_lr=ours.lr,
        min_lr=ours.min_lr,
        lr_warmup_steps=ours.warmup_samples,
        lr_decay_steps=ours.total_samples,
        lr_decay_style="WSD",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=ours.total_samples,
        wd_incr_style="constant",
        wsd_decay_steps=ours.decay_samples,
        lr_wsd_decay_style=ours.decay_style,
    )
    for _ in range(ours.total_samples // size + 3):
        for group in groups:
            assert ours.at(theirs.num_steps) == group["lr"], (theirs.num_steps, ours)
        compared += 1
        theirs.step(size)


equal_at_every_step()
print(f"COMPARED {compared} steps with {megatron.core.__file__}")
