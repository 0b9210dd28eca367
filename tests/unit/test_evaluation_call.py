"""evalscope's call is made of keys it knows; data, settings and sandbox are refused in one line."""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from conftest import ROOT

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.evaluation import datasets, evalscope, model
from megatron_fp8_ext.evaluation.benchmarks import BENCHMARKS

RECORDED = ROOT / "tests" / "evaluation" / f"evalscope_{evalscope.VERSION}.json"
ALL = list(BENCHMARKS.values())


def call(benchmark, data=Path("/data"), work=Path("/work"), **given):
    chosen = evalscope.settings(benchmark, **given)
    return evalscope.task(benchmark, chosen, served_name="m", data=data, work=work)


@pytest.mark.parametrize("benchmark", ALL, ids=lambda b: b.name)
@pytest.mark.parametrize("data", [Path("/data"), None], ids=["local", "downloaded"])
def test_every_key_is_in_the_recorded_schema(benchmark, data):
    known = json.loads(RECORDED.read_text())
    task = call(benchmark, data=data, system_prompt="Think.")
    assert set(task) <= set(known["task"])
    assert set(task["generation_config"]) <= set(known["generation_config"])
    assert set(task.get("sandbox", ())) <= set(known["sandbox"])
    (arguments,) = task["dataset_args"].values()
    assert set(arguments) <= set(known["dataset_args"])
    assert set(arguments.get("filters", ())) <= set(known["filters"])
    extra = known["extra_params"][benchmark.evalscope]
    assert set(arguments.get("extra_params", ())) <= set(extra)
    if data is None:
        offered = known["subsets"][benchmark.evalscope]
        assert set(arguments.get("subset_list", ())) <= set(offered)


def evalscope_python() -> Path:
    try:
        return evalscope.python_of()
    except UserError as error:
        pytest.skip(str(error))


def test_the_recorded_schema_is_evalscope_s():
    names = [b.evalscope for b in ALL]
    done = subprocess.run(
        [str(evalscope_python()), "-I", str(evalscope._RUNNER), "schema", "-", *names],
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout) == json.loads(RECORDED.read_text()), done.stderr[-500:]


def test_the_reference_s_settings():
    expected = {"aime24": (31000, 32, 32), "gpqa": (26000, 8, 32), "livecodebench": (27000, 8, 8)}
    for name, (tokens, samples, batch) in expected.items():
        task = call(BENCHMARKS[name])
        generation = task["generation_config"]
        assert (generation["temperature"], generation["top_p"]) == (0.65, 0.95)
        assert (generation["max_tokens"], task["repeats"], task["eval_batch_size"]) == (
            tokens,
            samples,
            batch,
        )
        (arguments,) = task["dataset_args"].values()
        assert arguments["filters"] == {"remove_until": "</think>"}
        assert "prompt_template" not in arguments, "the server applies the chat template"
    sandbox = call(BENCHMARKS["livecodebench"])["sandbox"]
    assert sandbox["enabled"] and sandbox["default_config"]["network_enabled"] is False


ROWS = {
    "aime24": {"problem": "1+1?", "answer": 2},
    "gpqa": {
        "Question": "Which?", "Correct Answer": "a", "Incorrect Answer 1": "b",
        "Incorrect Answer 2": "c", "Incorrect Answer 3": "d",
    },
    "livecodebench": {
        "question_content": "Add.", "starter_code": "", "contest_date": "2024-09-01T00:00:00",
        "public_test_cases": json.dumps([{"input": "1 2", "output": "3"}]), "metadata": "{}",
        "private_test_cases": base64.b64encode(
            zlib.compress(pickle.dumps(json.dumps([{"input": "2 2", "output": "4"}])))
        ).decode(),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_real_evalscope_accepts_the_call_and_renders_the_prompts(name, tmp_path):
    python, benchmark = evalscope_python(), BENCHMARKS[name]
    source = tmp_path / f"{name}.jsonl"
    source.write_text(json.dumps(ROWS[name]) + "\n")
    data = datasets.prepare(benchmark, [source], tmp_path / "data", python)
    task = call(benchmark, data=data.folder, work=tmp_path / "work", samples=2)
    if benchmark.runs_code and "ms-enclave" not in evalscope.installed(python):
        pytest.skip("needs evalscope[sandbox]")
    found = evalscope.check(python, task, tmp_path / "work", offline=True)
    assert found["samples"] == 2 and len(found["hashes"]) == 1
    text = json.dumps(found["prompts"])
    assert "<|" not in text and "ChatML" not in text
    assert [m["role"] for m in found["prompts"][0]][-1] == "user"
    for part, key in ((task, "repeat"), (task["generation_config"], "max_new_tokens")):
        part[key] = 1
        with pytest.raises(UserError, match=f"does not know.*{key}"):
            evalscope.check(python, task, tmp_path / "work", offline=True)
        del part[key]


def test_livecodebench_s_tests_are_json_in_our_copy(tmp_path):
    source = tmp_path / "livecodebench.jsonl"
    source.write_text(json.dumps(ROWS["livecodebench"]) + "\n")
    benchmark = BENCHMARKS["livecodebench"]
    data = datasets.prepare(benchmark, [source], tmp_path / "d", Path("python"))
    row = json.loads((data.folder / "test.jsonl").read_text())
    assert json.loads(row["private_test_cases"]) == [{"input": "2 2", "output": "4"}]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packed = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    source = tmp_path / "x.jsonl"
    source.write_text(json.dumps({**ROWS["livecodebench"], "private_test_cases": packed}))
    with pytest.raises(UserError, match=r"x\.jsonl, line 1, private_test_cases: .*mkdir"):
        datasets.prepare(BENCHMARKS["livecodebench"], [source], tmp_path / "d", Path("python"))
    assert not (tmp_path / "evil").exists() and not list((tmp_path / "d").iterdir())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"problem": "x", "answer": 1}\n{"problem": \n', "line 2: not valid JSON"),
        ('{"question_text": "x"}\n', "line 1: no 'problem', which aime24 needs"),
        ('{"problem": "x"}\n', "line 1: neither 'answer' nor 'solution'"),
        ("[1]\n", "line 1: not an object"),
        ("", "no rows for aime24"),
    ],
)
def test_bad_rows_are_named(tmp_path, content, words):
    source = tmp_path / "aime24.jsonl"
    source.write_text(content)
    with pytest.raises(UserError, match=words):
        datasets.prepare(BENCHMARKS["aime24"], [source], tmp_path / "d", Path("python"))
    assert not list((tmp_path / "d").iterdir()), "nothing half-written"


def folder_of_a_model(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"0" * 200_000)
    return tmp_path


def test_model_identity_context_and_special_tokens(tmp_path):
    folder = folder_of_a_model(tmp_path, max_position_embeddings=2048)
    first = model.read(folder)
    with pytest.raises(UserError, match="--max-tokens 1536 or less"):
        model.check_context(first, "aime24", 31000)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[100_000] = 1
    (folder / "model.safetensors").write_bytes(weights)
    assert model.read(folder).identity != first.identity
    prompt = [{"role": "user", "content": "<|im_start|>user\nWhat is 2 + 3?<|im_end|>"}]
    with pytest.raises(UserError, match="chat template would apply twice"):
        model.check_prompts(first, "aime24", [prompt])


def cli(*argv: str, **env: str):
    return subprocess.run(
        [sys.executable, "-m", "megatron_fp8_ext.cli", "eval", *argv],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["aime42"], "unknown benchmark 'aime42'"),
        (["aime24"], "--model is missing"),
        (["aime24", "--model", "/nowhere"], "nothing is downloaded from a model hub"),
        (["aime24", "--model", ".", "--server", "sgland"], "did you mean 'sglang'"),
        (["aime24", "--server", "openai"], "needs a URL"),
        (["aime24", "--model", ".", "--samples", "0"], "--samples 0: must be at least 1"),
        (["aime24", "--model", ".", "--temperature", "0"], "add --samples 1"),
        (["aime24", "--model", ".", "--evalscope", "/nowhere"], "no Python there"),
        (["aime24", "--model", ".", "--evalscope", sys.executable, "--samples", "4",
          "--pass-at", "8"], "raise --samples to 8"),
        (["livecodebench", "--model", ".", "--evalscope", sys.executable], "docker"),
        (["compare", "/nowhere", "/nowhere"], "no results.json there"),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else None,
)  # fmt: skip
def test_bad_input_is_one_line(argv, words):
    done = cli(*argv, PATH="/nowhere")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and words in done.stderr


def test_a_dry_run_prints_both_commands(tmp_path):
    folder_of_a_model(tmp_path)
    done = cli("aime24,gpqa", "--model", str(tmp_path), "--dry-run", "--tensor-parallel", "2")
    assert done.returncode == 0, done.stderr
    calls, end = json.JSONDecoder().raw_decode(done.stdout)
    assert [c["datasets"] for c in calls] == [["aime24"], ["gpqa_diamond"]]
    assert "-m sglang.launch_server" in done.stdout[end:] and "--tp-size 2" in done.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "scripts" / "eval").glob("*.sh")), ids=str)
def test_the_reference_s_scripts_name_known_benchmarks(script):
    name = script.read_text().split("eval ")[1].split()[0]
    assert name in BENCHMARKS and os.access(script, os.X_OK)


def test_openai_takes_its_url_as_the_next_word():
    url = "http://127.0.0.1:9/v1"
    for words in (["--server", "openai", url], ["--server", "openai", "--url", url]):
        done = cli("aime24", *words, "--samples", "32")
        assert done.returncode == 2 and f"{url}/models gives no list of models" in done.stderr


def test_sampling_that_a_server_may_add_is_known(tmp_path):
    folder = folder_of_a_model(tmp_path)
    said = {"top_k": 20, "repetition_penalty": 1.0, "min_p": 0.0, "temperature": 0.7}
    (folder / "generation_config.json").write_text(json.dumps(said))
    assert model.read(folder).sampling == {"top_k": 20}
