"""The light commands never import torch; every bad input is one line and a code."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT

TRACE = (
    "import sys, runpy; sys.argv = ['megatron-fp8', *{argv!r}]\n"
    "try:\n    runpy.run_module('megatron_fp8_ext.cli', run_name='__main__')\n"
    "except SystemExit as stop: code = stop.code\n"
    "heavy = [m for m in ('torch', 'numpy', 'megatron', 'transformer_engine') if m in sys.modules]\n"
    "print('HEAVY', heavy, 'CODE', code)\n"
)


def cli(*argv: str, **env: str):
    return subprocess.run(
        [sys.executable, "-m", "megatron_fp8_ext.cli", *argv],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "200", **env},
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"], ["--version"], ["list"], ["list", "losses"], ["show", "infir2"],
        ["expand", "--", "--bf16", "--use-distributed-optimizer", "--fp8-recipe", "infir2"],
        ["data", "tokenize", "--help"], ["compare", "--help"], ["report", "--help"],
        ["list", "presets"], ["show", "qwen2.5-7b-cpt"],
        ["run", "qwen2.5-7b-cpt", "--dry-run"], ["run", "qwen2.5-7b-rl-stage1", "--dry-run"],
        ["eval", "aime24", "--model", ".", "--dry-run"],
        ["convert", "--help"], ["convert", "verify", "--help"],
        ["data", "tokenize", "--help"],
        ["schedule", "plan", "--lr-schedule", "wsd", "--train-iters", "9", "--lr", "1e-3"],
        ["demo", "--help"], ["demo", "schedule", "--help"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_light_commands_import_nothing_heavy(argv):
    done = subprocess.run(
        [sys.executable, "-c", TRACE.format(argv=argv)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith(("CODE 0", "CODE None"))


def test_show_names_the_native_flags():
    done = cli("show", "infir2")
    assert "--fp8-recipe blockwise --fp8-format e4m3 --fp8-param-gather" in done.stdout
    assert "128x128" in done.stdout and "power_of_two" in done.stdout


def test_expand_prints_a_command_to_paste():
    done = cli("expand", "--", "--bf16", "--lr", "1e-4", "--fp8-recipe", "infir2-rl")
    assert "export NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1" in done.stdout.splitlines()
    last = done.stdout.splitlines()[-1]
    assert last == "--bf16 --lr 1e-4 --fp8-recipe blockwise --fp8-format e4m3"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["show", "infr2"], "did you mean 'infir2'"),
        (["run", "qwen2.5-7b-ctp"], "did you mean 'qwen2.5-7b-cpt'"),
        (["run", "qwen2.5-7b-cpt", "--dryrun"], "did you mean '--dry-run'"),
        (["run", "qwen2.5-7b-cpt", "--set", "nodse=2"], "did you mean 'nodes'"),
        (["run", "qwen2.5-7b-cpt", "--set", "nodes=0"], "at least 1"),
        (["run", "qwen2.5-7b-cpt", "--launcher", "ray"], "use --launcher torchrun or slurm"),
        (["run", "qwen2.5-7b-cpt", "--after", "/"], "holds no run.json"),
        (["list", "recipies"], "unknown kind"),
        (["expand", "--", "--bf16", "--fp16", "--fp8-recipe", "infir2"], "contradicts --fp16"),
        (["demo", "--iterations", "3"], "at least 20"),
        (["compare", "--output", "x"], "compare what?"),
        (["compare", "--output", "x", "qwen2.5-7b-ctp"], "alone is no training command"),
        (["compare", "--output", "x", "qwen2.5-7b-cpt"], "the training data is not given"),
        (["compare", "--output", "x", "qwen2.5-7b-cpt", "data"], "write it as key=value"),
        (["compare", "--output", "x", "demo", "fast"], "demo takes Megatron flags after it"),
        (["report", "/nowhere"], "no member.json"),
    ],
)
def test_bad_input_is_one_line(argv, words):
    done = cli(*argv)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("megatron-fp8: error:")
    assert words in done.stderr


def test_broken_corpus_names_file_and_line(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("megatron.core", reason="needs megatron-core")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="a")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    common = ["--tokenizer", str(tmp_path), "--output", str(tmp_path / "out")]
    for content, message in (
        ('{"text": "a"}\n{"text": \n', "corpus.jsonl, line 2: not valid JSON"),
        ('{"text": "a"}\n\n{"txt": "a"}\n', 'corpus.jsonl, line 3: no string under "text"'),
        ("", "corpus.jsonl is empty"),
    ):
        file = tmp_path / "corpus.jsonl"
        file.write_text(content)
        done = cli("data", "tokenize", str(file), *common, PYTHONWARNINGS="ignore")
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert not list(tmp_path.glob("out*")), "nothing half-written"
    done = cli("data", "tokenize", str(tmp_path / "none.jsonl"), *common)
    assert done.returncode == 2 and "none.jsonl does not exist" in done.stderr
    file.write_text(json.dumps({"text": "a a"}))
    done = cli("data", "tokenize", str(file), *common, PYTHONWARNINGS="ignore")
    assert done.returncode == 0 and "1 documents, 2 tokens" in done.stdout, done.stderr
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    assert [row.tolist() for row in IndexedDataset(str(tmp_path / "out"))] == [[0, 1]]


def test_pack_text_reads_parquet_and_stock_megatron_reads_it(tmp_path):
    pytest.importorskip("megatron.core", reason="needs megatron-core")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    from chat import write_tokenizer
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron_fp8_ext import tokenizer as tokenizers

    texts = ["a the", "é 😀", "\n\nthe end"]
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "a.parquet")
    argv = ["data", "pack", "--text", str(tmp_path / "a.parquet"), "--key", "body"]
    where = ["--tokenizer", str(write_tokenizer(tmp_path)), "--output", str(tmp_path / "out")]
    done = cli(*argv, *where, PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stderr
    tokenizer, end = tokenizers.load(tmp_path)
    rows = [row.tolist() for row in IndexedDataset(str(tmp_path / "out"))]
    assert rows == [[*tokenizer.encode(text).ids, end] for text in texts]
    refused = cli(*argv[:-1], "text", *where, PYTHONWARNINGS="ignore")
    assert refused.returncode == 2 and 'a.parquet, line 1: no string under "text"' in refused.stderr
