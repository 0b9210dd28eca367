"""The generated reasoning set checks itself."""

from __future__ import annotations

from megatron_fp8_ext.demo import reasoning


def test_its_own_answers_are_right_and_others_are_not(tmp_path):
    file = tmp_path / "sums.jsonl"
    reasoning.write(file, 200)
    for sample in reasoning.read(file):
        answer = sample["messages"][1]["content"]
        assert reasoning.well_formed(answer) and reasoning.verify(sample, answer)
        assert not reasoning.well_formed(answer.partition("</think>")[2])
        assert not reasoning.verify(sample, answer.replace("boxed{", "boxed{1"))
        assert not reasoning.verify(sample, answer.partition("</think>")[0])


def test_held_out_problems_are_new_and_as_short_as_asked(tmp_path):
    train, test = tmp_path / "train", tmp_path / "test"
    reasoning.write(train, 500, seed=1, longest=2)
    taken = {reasoning.question(sample) for sample in reasoning.read(train)}
    reasoning.write(test, 100, seed=1, longest=2, without=taken)
    asked = [reasoning.question(sample) for sample in reasoning.read(test)]
    assert len(asked) == 100 and not taken.intersection(asked)
    assert all(question.count("+") == 1 for question in asked)
