"""A branch reads its data in the stable run's order, whatever the lengths; sized by Megatron it does not."""

from __future__ import annotations

import types

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("torch")
pytest.importorskip("megatron")

import numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import data_order, index_cache, run
from megatron_fp8_ext.megatron_plugin.branch import Branch, BranchPoint

pytestmark = pytest.mark.megatron
SEQ = 16


class Builder(BlendedMegatronDatasetBuilder):
    """The real builder; the seam is set on this subclass alone."""


data_order.size_as_planned(types.SimpleNamespace(BlendedMegatronDatasetBuilder=Builder))


class Tokenizer:
    """What GPTDataset asks of one."""

    unique_identifiers = "bytes"
    eod = 256
    vocab_size = 512


def build(builder, folder, blend, samples, seed=1, cache=None):
    config = GPTDatasetConfig(
        random_seed=seed, sequence_length=SEQ, blend=blend, split="100,0,0", path_to_cache=cache,
        tokenizer=Tokenizer(), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False, mid_level_dataset_surplus=0.005,
    )  # fmt: skip
    return builder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]


def ids(dataset, count):
    """(corpus, sample of its stream, documents, offsets) of the first `count` samples."""
    out = []
    for index in range(count):
        part, inner = dataset, index
        if hasattr(dataset, "datasets"):
            part = dataset.datasets[dataset.dataset_index[index]]
            inner = dataset.dataset_sample_index[index]
        sample = int(part.shuffle_index[inner])
        (first, begin), (last, end) = part.sample_index[sample], part.sample_index[sample + 1]
        documents = tuple(part.document_index[first : last + 1].tolist())
        out.append((part.dataset_path, sample, documents, int(begin), int(end)))
    return out


def branch(planned, start, length):
    point = BranchPoint(
        checkpoint="stable", iteration=start, consumed_samples=start, scheduler_samples=start,
        global_batch_size=1, seq_length=SEQ, by_samples=False, lr=1e-3, min_lr=0.0, warmup_samples=0,
        decay_style="cosine", planned_samples=planned,
    )  # fmt: skip
    return Branch(point=point, decay_iters=length, decay_style="cosine", lr=1e-3, min_lr=0.0)


@pytest.fixture
def paths(small_corpora, monkeypatch):
    monkeypatch.setattr(run, "current", run.Run())
    return [str(small_corpora / name) for name in "ab"]


BLENDS = {
    "one": lambda paths: ([paths[0]], None),
    "weighted": lambda paths: (paths, [3.0, 2.0]),
    "by size": lambda paths: (paths, None),
}


@pytest.mark.parametrize("kind", BLENDS)
def test_a_branch_reads_on_where_the_plan_leads(paths, kind, tmp_path):
    blend = BLENDS[kind](paths)
    reshuffled = 0

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.data())
    def check(data):
        nonlocal reshuffled
        # A blend without weights is one pass over both, at most.
        most = 80 if kind == "by size" else 190
        planned = data.draw(st.integers(10, most))
        start = data.draw(st.integers(1, planned))
        seed = data.draw(st.integers(1, 50))
        run.current = run.Run()
        stable = build(Builder, paths, blend, planned, seed)
        plan = run.current.sample_plan
        assert plan.planned_samples == planned <= plan.available_samples
        length = data.draw(st.integers(1, max(plan.available_samples - start, 1)))
        end = start + length
        if end > plan.available_samples:
            return
        run.current = run.Run(branch=branch(planned, start, length))
        made = build(Builder, paths, blend, end, seed)
        # Up to the plan's end the very samples of the stable run; beyond it, on in the same epochs.
        both = min(end, len(stable))
        assert ids(made, both) == ids(stable, both)
        consumed = ids(made, end)
        assert len(set(consumed)) == end
        longest = run.Run(branch=branch(planned, start, plan.available_samples - start))
        if longest.branch.decay_iters > 0:
            run.current = longest
            assert ids(build(Builder, paths, blend, plan.available_samples, seed), end) == consumed
        stock = build(BlendedMegatronDatasetBuilder, paths, blend, end, seed)
        reshuffled += ids(stock, min(end, len(stock))) != consumed

    check()
    if kind != "by size":  # or the property above would hold without us
        assert reshuffled > 5


@pytest.mark.parametrize("kind", ["one", "weighted"])
def test_data_that_ends_before_the_decay_is_refused(paths, kind, capsys):
    blend = BLENDS[kind](paths)
    build(Builder, paths, blend, 120)
    available = run.current.sample_plan.available_samples
    run.current = run.Run(branch=branch(120, 100, available - 100 + 1))
    with pytest.raises(SystemExit):
        build(Builder, paths, blend, available + 1)
    said = capsys.readouterr().err
    assert f"ends at {available}: decay over at most {available - 100} iterations" in said


def test_other_data_than_the_stable_runs_is_refused(paths, capsys):
    build(Builder, paths, ([paths[0]], None), 120)
    plan = run.current.sample_plan
    made = branch(120, 100, 5)
    point = BranchPoint(**{**vars(made.point), "plan": plan})
    run.current = run.Run(branch=Branch(**{**vars(made), "point": point}))
    with pytest.raises(SystemExit):
        build(Builder, paths, ([paths[1]], None), 105)
    assert "has 8 training documents of 500 tokens, and had 13 of 804" in capsys.readouterr().err


def test_a_torn_index_is_built_again(paths, tmp_path, capsys):
    whole = build(Builder, paths, ([paths[0]], None), 120, cache=str(tmp_path))
    wanted = ids(whole, 120)
    torn = sorted(tmp_path.glob("*sample_index.npy"))[0]
    del whole
    torn.write_bytes(torn.read_bytes()[:-7])
    with pytest.raises(ValueError, match="mmap"):
        build(BlendedMegatronDatasetBuilder, paths, ([paths[0]], None), 120, cache=str(tmp_path))
    again = build(Builder, paths, ([paths[0]], None), 120, cache=str(tmp_path))
    assert ids(again, 120) == wanted
    assert f"{torn} was cut short" in capsys.readouterr().out


def test_only_torn_indexes_are_dropped(tmp_path):
    numpy.save(tmp_path / "whole_index.npy", numpy.arange(9))
    numpy.save(tmp_path / "torn_index.npy", numpy.arange(9))
    (tmp_path / "empty_index.npy").touch()
    (tmp_path / "other.npy").write_bytes(b"x")
    torn = tmp_path / "torn_index.npy"
    torn.write_bytes(torn.read_bytes()[:-1])
    dropped = index_cache.drop_torn([tmp_path, tmp_path / "nowhere"])
    assert [path.name for path in dropped] == ["empty_index.npy", "torn_index.npy"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.npy", "whole_index.npy"]


def test_the_end_of_the_data_is_an_error_before_anything_is_loaded():
    from megatron_fp8_ext.megatron_plugin.branch import enough_data

    enough_data(branch(120, 100, 5), 105)
    with pytest.raises(UserError, match="branch from an earlier checkpoint"):
        enough_data(branch(120, 100, 5), 100)
