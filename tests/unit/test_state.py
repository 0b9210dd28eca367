"""Arguments and schedule of a checkpoint are read without running anything of it."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import zipfile

import checkpoints
import pytest

from megatron_fp8_ext.checkpoint import sample_plan, state
from megatron_fp8_ext.checkpoint.sample_plan import Corpus, SamplePlan
from megatron_fp8_ext.errors import UserError


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("common_file", [True, False])
def test_arguments_and_schedule(tmp_path, common_file):
    found = state.read(checkpoints.write(tmp_path, 40, common_file=common_file), 40)
    assert found.args["seq_length"] == 16 and found.args["data_path"] == ["a"]
    assert found.args["params_dtype"] == "bfloat16"  # by name: torch is not imported
    assert found.scheduler["num_steps"] == 160


def archive(payload):
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as file:
        file.writestr("common/data.pkl", pickle.dumps(payload))
    return raw.getvalue()


def test_foreign_classes_are_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(seed=3, evil=Evil(), nested=[Evil()])
    (tmp_path / "common.pt").write_bytes(archive({"args": args, "more": Evil()}))
    assert state.read(tmp_path, 1).args == {"seed": 3}
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04nonsense", archive([1, 2]), archive({"args": 3})])
def test_damaged_files_are_one_line(tmp_path, raw):
    (tmp_path / "common.pt").write_bytes(raw)
    with pytest.raises(UserError, match="cannot be read") as caught:
        state.read(tmp_path, 1)
    assert "\n" not in str(caught.value)


def test_sample_plans_survive_their_file(tmp_path):
    corpora = (Corpus(path="a", weight=0.25, documents=3, tokens=99),)
    plan = SamplePlan(planned_samples=8, available_samples=11, corpora=corpora)
    assert sample_plan.read(tmp_path) is None
    plan.write(tmp_path)
    assert sample_plan.read(tmp_path) == plan
    assert [path.name for path in tmp_path.iterdir()] == [sample_plan.FILE]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"planned_samples": 0}', '{"corpora": 3}'])
def test_bad_sample_plans_are_one_line(tmp_path, text):
    (tmp_path / sample_plan.FILE).write_text(text)
    with pytest.raises(UserError, match="is not a sample plan"):
        sample_plan.read(tmp_path)
