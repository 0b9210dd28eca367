"""Packs as arrays: borders, positions, padding of its own, context-parallel parts; steps are pure."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_fp8_ext.packing import batches
from megatron_fp8_ext.sft import loss


def layout(**changes):
    return batches.Layout(**{"capacity": 32, "multiple": 8, "ranks": 1, "batch": 8, **changes})


def sample(*tokens, masked=1):
    mask = np.ones(len(tokens), bool)
    mask[:masked] = False
    return np.array(tokens), mask


def test_a_pack_to_the_token():
    pack = batches.assemble([sample(1, 2, 3), sample(7, 8)], loss.infialign.weigh, layout())
    assert pack.tokens.tolist() == [1, 2, 3, 7, 8, 0, 0, 0]
    assert pack.labels.tolist() == [2, 3, 0, 8, 0, 0, 0, 0]
    assert pack.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert pack.weights.tolist() == pack.units.tolist() == [1, 1, 0, 1, 0, 0, 0, 0]
    assert pack.cuts.tolist() == [0, 3, 5, 8]  # the padding is a sequence of its own
    assert pack.longest == 3


def test_an_empty_pack_is_all_padding():
    pack = batches.assemble([], loss.infialign.weigh, layout())
    assert pack.cuts.tolist() == [0, 8] and not pack.weights.any() and not pack.units.any()


def test_a_full_pack_has_no_padding_sequence():
    pack = batches.assemble([sample(*range(8))], loss.infialign.weigh, layout())
    assert pack.cuts.tolist() == [0, 8]


def test_fixed_packs_have_one_shape():
    pack = batches.assemble([sample(1, 2, 3)], loss.infialign.weigh, layout(fixed=True))
    assert pack.cuts.tolist() == [0, 3, 11, 19, 27, 32] and len(pack.tokens) == 32


def test_context_parallel_parts_are_the_whole_and_mirror_each_other():
    cut = layout(context=2)
    whole = batches.assemble([sample(1, 2, 3, 4, 5), sample(6, 7)], loss.infialign.weigh, cut)
    assert whole.cuts.tolist() == [0, 8, 12, 16]  # samples padded to 4, inside their own sequence
    parts = [batches.context_parallel_part(whole.cuts, 2, rank) for rank in range(2)]
    assert parts[0].tolist() == [0, 1, 6, 7, 8, 11, 12, 15]
    assert sorted(np.concatenate(parts).tolist()) == list(range(16))
    held = batches.on_context_parallel_rank(whole, 2, 1)
    assert held.tokens.tolist() == whole.tokens[parts[1]].tolist()


LENGTHS = np.random.default_rng(0).integers(2, 33, 50)


@pytest.mark.parametrize("scope", ["batch", "epoch"])
def test_samples_of_a_step_depend_on_neither_ranks_nor_start(scope):
    plans = [batches.Plan(LENGTHS, layout(ranks=r, scope=scope), seed=1) for r in (1, 2, 4)]
    for consumed in (0, 8, 16, 48, 400):
        steps = []
        for plan in plans:
            ranks = plan.layout.ranks
            packs = [plan.step(consumed, rank) for rank in range(ranks)]
            assert len({len(mine) for mine in packs}) == 1
            steps.append(sorted(i for mine in packs for pack in mine for i in pack))
            # Another process that starts right here, as after a resume.
            resumed = batches.Plan(LENGTHS, plan.layout, seed=1)
            assert resumed.step(consumed, ranks - 1) == packs[ranks - 1]
        assert steps[0] == steps[1] == steps[2] == sorted(plans[0].samples(consumed).tolist())


def test_epoch_scope_is_fuller_and_another_composition():
    lengths = np.random.default_rng(1).integers(2, 33, 4000)
    plan = batches.Plan(lengths, layout(scope="epoch"), seed=1)
    fill = np.mean([sum(lengths[i] for i in pack) for pack in plan.step(0, 0)]) / 32
    assert fill > 0.95
    assert len(plan.samples(0)) > 8  # eight packs, not eight samples


def test_microbatches_vary_and_losses_are_all_there():
    plan = batches.Plan(LENGTHS, layout(), seed=1)
    counts = {len(plan.step(consumed, 0)) for consumed in range(0, 400, 8)}
    assert len(counts) > 1


@pytest.mark.parametrize("context", [1, 2])
def test_sample_mean_weighs_samples_alike_whatever_the_split(context):
    cut = layout(context=context)
    pack = batches.assemble([sample(*range(1, 12)), sample(1, 2, 3)], loss.sample_mean.weigh, cut)
    parts = [batches.on_context_parallel_rank(pack, context, r) for r in range(context)]
    assert sum(part.units.sum() for part in parts) == 2
    assert sum(part.weights.sum() for part in parts) == pytest.approx(2)
