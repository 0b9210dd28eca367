"""What we start SGLang and vLLM with is in their recorded flags, and means what we think it does.

Recorded from SGLang 0.5.23, vLLM 0.32.0 and 0.33.0 by tests/evaluation/server_flags.py.
MEGATRON_FP8_SGLANG_PYTHON and MEGATRON_FP8_VLLM_PYTHON (a Python with the server; no GPU needed) have
their real parsers read it.
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from conftest import ROOT

from megatron_fp8_ext.evaluation import server as serving
from megatron_fp8_ext.evaluation.server import ServerSpec

HERE = ROOT / "tests" / "evaluation"
RECORDED = json.loads((HERE / "server_flags.json").read_text())
# What the parsers make of our command, by their names.
MEANT = {
    "sglang": {
        "model_path": "{model}", "served_model_name": "m", "host": "127.0.0.1", "port": 1234,
        "tp_size": 2, "sampling_defaults": "openai", "trust_remote_code": False, "api_key": "SECRET",
        "reasoning_parser": None, "context_length": 32768,
    },
    "vllm": {
        "model_tag": "{model}", "served_model_name": ["m"], "host": "127.0.0.1", "port": 1234,
        "tensor_parallel_size": 2, "generation_config": "vllm", "trust_remote_code": False,
        "reasoning_parser": "", "max_model_len": 32768,
    },
}  # fmt: skip
EXTRA = {"sglang": ("--context-length", "32768"), "vllm": ("--max-model-len", "32768")}


def command(kind, tmp_path):
    (tmp_path / "model").mkdir(exist_ok=True)
    spec = ServerSpec(
        kind=kind,
        name="m",
        model=tmp_path / "model",
        python="python",
        tensor_parallel=2,
        extra=EXTRA[kind],
    )
    words, _ = serving.command(spec, 1234, "SECRET", tmp_path / "key.yaml")
    return words[3:]


@pytest.mark.parametrize("name", RECORDED)
def test_every_flag_is_recorded(name, tmp_path):
    kind, known = name.split()[0], RECORDED[name]
    words = command(kind, tmp_path)
    for place, word in enumerate(words):
        if word.startswith("--"):
            assert word in known, f"{name} has no {word}"
            takes = known[word]
            assert takes != 0, f"{word} takes no value"
            if isinstance(takes, list):
                assert words[place + 1] in takes
    assert "--trust-remote-code" not in words, "no code out of a checkpoint"


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
def test_the_real_parser_reads_it(kind, tmp_path):
    variable = f"MEGATRON_FP8_{kind.upper()}_PYTHON"
    if not (python := os.environ.get(variable)):
        pytest.skip(f"needs {variable}, a Python with {kind}")
    recorder = [python, str(HERE / "server_flags.py"), kind]

    def printed(*words):
        done = subprocess.run([*recorder, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    parsed = printed(*command(kind, tmp_path))
    for key, meant in MEANT[kind].items():
        meant = meant.format(model=tmp_path / "model") if isinstance(meant, str) else meant
        assert (parsed.get(key) or None) == (meant or None), key  # printed without null
    found = printed()
    recorded = RECORDED.get(f"{kind} {found['version']}")
    assert recorded is None or recorded == found["flags"], "record it anew"
