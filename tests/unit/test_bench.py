"""`megatron-fp8 bench`: one clear line where nothing can be measured; the table says what the record says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT, run

torch = pytest.importorskip("torch")
CLI = (sys.executable, "-m", "megatron_fp8_ext.cli", "bench", "kernels")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can measure")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    done = subprocess.run(
        [*CLI, "--output", str(tmp_path / "x")], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.startswith("megatron-fp8: error: bench: ")
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--model", "qwen2.5-15b"), "did you mean 'qwen2.5-1.5b'?"),
        (("--tokens", "0"), "--tokens 0: give it a positive number"),
    ],
)
def test_bad_options(argv, message):
    done = run([*CLI, *argv])
    assert done.code == 2 and message in done.output


def test_table():
    from megatron_fp8_ext.benchmark import kernels

    time = {"median": 2.0, "low": 1.9, "high": 2.1, "repetitions": 5}
    row = {"kernel": "cast", "by": "ours", "time": time, "peak_mb": 3.0, "note": "8 warps"}
    text = kernels.markdown(
        {
            "shape": {"name": "m", "tokens": 1, "hidden": 2, "ffn": 3, "vocabulary": 4},
            "device": "GPU",
            "versions": {"torch": "2"},
            "copy_tb_s": 4.0,
            "bf16_gemm_tflop_s": 700.0,
            "rows": [
                {**row, "bytes": 6 * 10**9, "flops": 0, "of_limit": 0.75},
                {**row, "bytes": 0, "flops": 10**12, "of_limit": 0.714},
            ],
        }
    )
    assert "| cast | ours | 2.000 (1.900 to 2.100) | 3.00 TB/s | 0.75 | 3 | 8 warps |" in text
    assert "| 500 TFLOP/s | 0.71 |" in text


def test_what_is_compared_is_measured_in_turns(monkeypatch):
    """A clock that runs slower with each call: who comes later is not the slower one."""
    from megatron_fp8_ext.benchmark import timing

    now, called = 0.0, []

    class Event:
        def __init__(self, enable_timing):
            self.at = 0.0

        def record(self):
            self.at = now

        def elapsed_time(self, other):
            return other.at - self.at

    def work(name, size):
        def call():
            nonlocal now
            called.append(name)
            now += size * (1 + len(called) / 1000)

        return call

    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing.torch, "empty", lambda *size, **more: timing.torch.zeros(1))
    first, second = timing.in_turns([work("first", 1.0), work("second", 1.0)], budget_ms=50)
    assert called == ["first", "second"] * (len(called) // 2)
    assert first.repetitions == second.repetitions > 40
    assert second.median == pytest.approx(first.median, rel=2e-3)
    assert first.low < first.median < first.high
    assert timing.measure(work("alone", 3.0), budget_ms=30).median == pytest.approx(3.3, rel=0.1)


def test_bench_convert_says_what_it_needs(tmp_path, monkeypatch):
    from megatron_fp8_ext.benchmark import conversion
    from megatron_fp8_ext.errors import UserError

    with pytest.raises(UserError, match=r"choose Qwen2.5-1.5B or Qwen2.5-7B"):
        conversion.run("Qwen2.5-8B", tmp_path / "x", None, False, "cpu")
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="exists; give --folder another place"):
        conversion.run("Qwen2.5-7B", tmp_path / "mine", None, False, "cpu")
    usage = type("Usage", (), {"free": 20e9})
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="needs 46 GB, 20 GB are free"):
        conversion.run("Qwen2.5-7B", tmp_path / "x", None, False, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_every_conversion_stays_below_its_limit_of_memory(tmp_path):
    """One layer with the whole vocabulary of Qwen2.5-7B: the largest tensors decide, not the layers."""
    done = run(
        [*CLI[:-1], "convert", "--layers", "1", "--folder", str(tmp_path / "scratch"), "--output",
         str(tmp_path / "bench")], timeout=800,
    )  # fmt: skip
    assert done.code == 0, done.output[-3000:]
    record = json.loads((tmp_path / "bench.json").read_text())
    assert len(record["rows"]) == 8 and not (tmp_path / "scratch").exists()
    for row in record["rows"]:
        assert row["peak"] < max(2 * record["shard_bytes"], 6e9), row
        assert row["read"] > record["bytes"] / 2 and row["seconds"] > 0, row
