"""A running Ray cluster of two nodes, one of which cannot train: found before anything is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import ray_cluster
from conftest import ROOT

from megatron_fp8_ext import presets
from megatron_fp8_ext.launch import ray_nodes

# A slime that trains nothing, but says that it was started.
TRAIN = "def train(args): open('started', 'w').close()\n"
V03 = "step_global_batch_size = None\n"  # what `checkout` knows v0.3 by


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Everything that `run` asks for before it starts."""
    folder = tmp_path_factory.mktemp("cluster")
    loss = folder / "slime" / "slime" / "backends" / "megatron_utils" / "loss.py"
    arguments = folder / "slime" / "slime" / "utils" / "arguments.py"
    init = folder / "slime" / "slime" / "__init__.py"
    for file, text in (
        (init, ""),
        (loss, V03),
        (arguments, ""),
        (folder / "slime" / "train.py", TRAIN),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "model").mkdir()
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    quantization["activation_scheme"] = "dynamic"
    config = {**presets.model_facts("Qwen2.5-7B"), "quantization_config": quantization}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "data.jsonl").write_text("{}\n")
    (folder / "init" / "iter_0000001").mkdir(parents=True)
    (folder / "init" / "latest_checkpointed_iteration.txt").write_text("1")
    return folder


def run(place: Path, address: str, *more: str, nodes: int = 2) -> subprocess.CompletedProcess[str]:
    words = "run qwen2.5-7b-rl-stage1 --data data.jsonl --model model --init init --slime slime"
    words += f" --launcher ray --ray-address {address} --nodes {nodes} --gpus 1 --set context-parallel-size=1"
    words += " --set tensor-model-parallel-size=1 --set rollout-num-gpus-per-engine=1"
    argv = [sys.executable, "-m", "megatron_fp8_ext.cli", *words.split(), *more]
    return subprocess.run(
        argv, cwd=place, env=ray_cluster.environment(), capture_output=True, text=True, timeout=300
    )


def jobs(address: str) -> list[str]:
    with urllib.request.urlopen(f"{address}/api/jobs/", timeout=10) as answer:
        return [job["entrypoint"] for job in json.load(answer) if job["type"] == "SUBMISSION"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_cannot_train_is_named_and_nothing_starts(place):
    broken = {"NVTE_BACKWARD_OVERRIDE": "dequantized"}
    external = ["--", "--fp8-emulate", "--rollout-external-engine-addrs", "127.0.0.1:1"]
    with ray_cluster.started(place, [{}, broken]) as address:
        shown = run(place, address, "--dry-run", *external)
        assert shown.returncode == 0 and "doctor \\\n    --every-node" in shown.stdout
        assert jobs(address) == [], "a dry run submits nothing"
        done = run(place, address, *external)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "ok   " in done.stdout and "FAIL 127.0.0.2, 1 GPU: " in done.stdout, done.stdout
        reason = "127.0.0.2: NVTE_BACKWARD_OVERRIDE: dequantized: the backward would not be FP8"
        assert reason in done.stdout + done.stderr and "unset it" in done.stdout + done.stderr
        assert "training was not started" in done.stderr
        # What the nodes do not have: GPUs that torch sees, and more nodes.
        done = run(place, address, "--", *external[2:], nodes=4)
        assert done.returncode == 1
        for words in (
            "the cluster: 2 GPUs, and this run waits for 4",
            "127.0.0.2: GPU: torch sees 0 of the 1 this run needs",
        ):
            assert words in done.stdout + done.stderr, done.stdout
        submitted = jobs(address)
        assert len(submitted) == 2 and all("doctor --every-node" in job for job in submitted)
    assert not (place / "started").exists()


def test_nodes_with_gpus_or_all():
    rows = [
        {"NodeID": "a", "NodeManagerAddress": "h0", "Alive": True, "Resources": {}},
        {"NodeID": "b", "NodeManagerAddress": "h1", "Alive": True, "Resources": {"GPU": 8.0}},
        {"NodeID": "c", "NodeManagerAddress": "h2", "Alive": False, "Resources": {"GPU": 8.0}},
    ]
    assert ray_nodes.chosen(rows) == [ray_nodes.Node("b", "h1", 8)]
    assert [node.address for node in ray_nodes.chosen([rows[0], rows[2]])] == ["h0"]


def test_a_node_without_this_package_says_so():
    done = subprocess.run(
        [sys.executable, "-I", "-m", "megatron_fp8_ext_of_nobody"], capture_output=True, text=True
    )
    (reason,) = ray_nodes.failures((done.returncode, done.stdout, done.stderr))
    assert "No module named" in reason and "pip install megatron-fp8-ext on every node" in reason
    assert ray_nodes.failures((1, "", "")) == ["doctor ended with exit code 1: it said nothing"]


def test_a_real_report_is_read():
    argv = [sys.executable, "-W", "ignore", "-m", "megatron_fp8_ext.cli", "doctor", "--json"]
    done = subprocess.run(
        [*argv, "--gpus", "99"], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "NVTE_BACKWARD_OVERRIDE": "dequantized"},
    )  # fmt: skip
    assert done.returncode == 1
    found = ray_nodes.failures((done.returncode, done.stdout, done.stderr))
    assert any("of the 99 this run needs" in reason for reason in found), found
    assert any(reason.startswith("NVTE_BACKWARD_OVERRIDE") for reason in found), found
