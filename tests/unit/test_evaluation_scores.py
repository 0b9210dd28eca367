"""avg@k, pass@k, standard errors and the paired difference against closed forms and brute force."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics

import pytest

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.evaluation import compare, results
from megatron_fp8_ext.evaluation.results import Answer


def answers(rows, stop="stop"):
    return [
        Answer(question=q, right=bool(r), stop=stop, tokens=10, prompt_tokens=5, scored=True)
        for q, row in enumerate(rows)
        for r in row
    ]


@pytest.mark.parametrize(("n", "c"), [(5, 0), (5, 2), (6, 5), (4, 4)])
def test_pass_at_k_is_the_mean_over_all_draws(n, c):
    marks = [1] * c + [0] * (n - c)
    for k in range(1, n + 1):
        draws = [any(d) for d in itertools.combinations(marks, k)]
        assert results.pass_at_k(n, c, k) == pytest.approx(statistics.fmean(draws))
    with pytest.raises(ValueError, match="cannot be estimated"):
        results.pass_at_k(n, c, n + 1)


def test_score_of_known_answers():
    rows = [(1, 1, 0, 0), (1, 1, 1, 1), (0, 0, 0, 0)]
    found = results.score("aime24", answers(rows), ["a", "b", "c"], 4, [1, 2])
    assert found.average == pytest.approx(50)
    assert found.se == pytest.approx(100 * 0.5 / math.sqrt(3))
    assert found.se_answers == pytest.approx(100 * math.sqrt(0.25 / 3) / 3)
    assert found.pass_at[1][0] == pytest.approx(50)
    assert found.pass_at[2][0] == pytest.approx(100 * (5 / 6 + 1) / 3)


def test_se_answers_is_the_spread_of_repeated_evaluations():
    """Evaluate a known model many times: the spread of avg@k is what se_answers estimates."""
    chance, source = [0.1, 0.5, 0.9, 0.7], random.Random(0)
    scores, errors = [], []
    for _ in range(400):
        rows = [[source.random() < p for _ in range(8)] for p in chance]
        found = results.score("aime24", answers(rows), list("abcd"), 8, [])
        scores.append(found.average)
        errors.append(found.se_answers**2)
    true = 100 * math.sqrt(sum(p * (1 - p) / 8 for p in chance)) / 4
    assert statistics.stdev(scores) == pytest.approx(true, rel=0.1)
    assert math.sqrt(statistics.fmean(errors)) == pytest.approx(true, rel=0.05)


def test_missing_answers_are_no_score():
    with pytest.raises(UserError, match="question 1 has 1 answers instead of 2"):
        results.score("gpqa", answers([(1, 1), (1,)]), ["a", "b"], 2, [])


def test_truncation_is_told_with_its_mend():
    cut = results.score("aime24", answers([(0, 0)], "max_tokens"), ["a"], 2, [])
    said = " ".join(results.warnings(cut, 48, 31000, 30))
    assert cut.truncated == 100 and "all answers were cut at 48" in said and "--max-tokens" in said
    looping = " ".join(results.warnings(cut, 31000, 31000, 1))
    assert "looping" in looping


def test_a_torn_last_line_is_no_answer(tmp_path):
    row = {
        "index": 0,
        "model_output": {"choices": [{"stop_reason": "stop"}], "usage": {"output_tokens": 3}},
    }
    review = {"index": 0, "sample_score": {"group_id": 0, "score": {"value": {"acc": 1.0}}}}
    for kind, content in (("predictions", row), ("reviews", review)):
        (tmp_path / kind / "model").mkdir(parents=True)
        text = json.dumps(content)
        (tmp_path / kind / "model" / "x.jsonl").write_text(f"{text}\n{text[:20]}")
    assert len(results.read(tmp_path)) == 1 and results.finished(tmp_path) == 1


@pytest.mark.parametrize(
    ("degrees", "value"), [(1, 12.7062), (2, 4.30265), (5, 2.57058), (29, 2.04523), (197, 1.97208)]
)
def test_student_quantile_is_the_table_s(degrees, value):
    assert compare.t_quantile(0.975, degrees) == pytest.approx(value, abs=1e-5)


def outcome(right, samples=4, prompts=None, **settings):
    prompts = prompts or [str(i) for i in range(len(right))]
    part = {"right": right, "samples": samples, "prompts": prompts}
    same = {"samples": samples, "max_tokens": 9, "temperature": 0.65, **settings}
    return {"benchmarks": {"aime24": {**part, "settings": same}}}


def test_paired_difference():
    (found,) = compare.compare(outcome([4, 2, 1, 0]), outcome([4, 1, 1, 1]))
    gaps = [0, -25, 0, 25]
    half = 3.18245 * statistics.stdev(gaps) / 2
    assert found.difference == 0 and found.high == pytest.approx(half, abs=1e-3)
    assert (found.better, found.worse, found.equal) == (1, 1, 2)
    assert "no difference seen" in found.says
    (worse,) = compare.compare(outcome([4, 4, 3, 4]), outcome([1, 0, 0, 1]))
    assert worse.says == "B is worse" and worse.high < 0
    (same,) = compare.compare(outcome([4, 2]), outcome([4, 2]))
    assert same.says == "the same on every question"


def test_interval_covers_as_often_as_it_says():
    source, hits = random.Random(1), 0
    for _ in range(300):
        chance = [source.random() for _ in range(30)]
        a, b = ([sum(source.random() < p for _ in range(8)) for p in chance] for _ in range(2))
        (found,) = compare.compare(outcome(a, 8), outcome(b, 8))
        hits += found.low <= 0 <= found.high
    assert 0.91 <= hits / 300 <= 0.98


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (outcome([1, 1], prompts=["x", "y"]), "did not answer the same prompts"),
        (outcome([1, 1], max_tokens=10), "max_tokens is 9 in A and 10 in B"),
        ({"benchmarks": {"gpqa": {}}}, "no benchmark in common"),
    ],
)
def test_only_like_is_compared_with_like(other, words):
    with pytest.raises(UserError, match=words):
        compare.compare(outcome([1, 1]), other)
