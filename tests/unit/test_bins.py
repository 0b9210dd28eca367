"""Packing: exactly best-fit decreasing, balanced without changing the batch, a pure function of the seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.packing import balance, bins, order, simulate


def textbook(lengths, capacity):
    """Loads of best-fit decreasing, one sample at a time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(capacity - length)
    return sorted(capacity - room for room in rooms)


cases = st.integers(2, 80).flatmap(
    lambda capacity: st.tuples(
        st.just(capacity), st.lists(st.integers(1, capacity), min_size=1, max_size=120)
    )
)


@given(cases)
def test_is_textbook_best_fit_decreasing(case):
    capacity, lengths = case
    packs = bins.best_fit_decreasing(np.array(lengths), capacity)
    assert sorted(packs.loads(np.array(lengths)).tolist()) == textbook(lengths, capacity)
    assert sorted(packs.samples.tolist()) == list(range(len(lengths)))


@pytest.mark.parametrize(("length", "shown"), [(0, "0 tokens"), (9, "9 tokens")])
def test_a_length_that_fits_no_pack_is_named(length, shown):
    with pytest.raises(UserError, match=f"sample 1 has {shown}"):
        bins.best_fit_decreasing([3, length], 8)


@given(cases, st.integers(1, 8), st.sampled_from([float("inf"), 40.0]))
def test_schedule_keeps_the_batch_and_the_capacity(case, ranks, attention):
    capacity, lengths = case
    plan = balance.schedule(lengths, ranks, capacity, balance.Cost(attention))
    assert len(plan) == ranks and len({len(packs) for packs in plan}) == 1
    placed = [sample for packs in plan for pack in packs for sample in pack]
    assert sorted(placed) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= capacity for packs in plan for pack in packs)
    fewest = -(-len(textbook(lengths, capacity)) // ranks)
    assert len(plan[0]) == fewest


@pytest.mark.parametrize(
    ("ranks", "layer", "fill", "tokens", "cost"),
    [
        (4, (3584, 18944, 3584, 512), 0.88, 0.92, 0.99),
        (8, (1536, 8960, 1536, 256), 0.80, 0.85, 0.98),
    ],
)
def test_infir2_settings_reach_the_bars(ranks, layer, fill, tokens, cost):
    period = balance.Cost(balance.attention_length(*layer, gated=True))
    lengths = simulate.lognormal_lengths(64 * 200, seed=5)
    theirs, ours = simulate.simulate(lengths, 64, ranks, simulate.CAPACITY, period)
    assert ours.fill >= fill and ours.tokens >= tokens and ours.cost >= cost
    assert theirs.fill < ours.fill - 0.1 and theirs.tokens < ours.tokens - 0.1


def test_every_epoch_has_each_sample_once_in_its_own_order():
    stream = order.EpochOrder(10, seed=3)
    first, second = stream.take(0, 10), stream.take(10, 10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    # A batch over the border of two epochs, and a start anywhere.
    assert stream.take(7, 6).tolist() == [*first[7:], *second[:3]]
    assert order.EpochOrder(10, seed=4).take(0, 10).tolist() != first.tolist()
