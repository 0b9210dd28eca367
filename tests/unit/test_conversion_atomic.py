"""Killed processes leave nothing or everything; memory stays below two shards."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
pytest.importorskip("safetensors")
import hf_models  # noqa: E402
from conftest import ROOT  # noqa: E402

from megatron_fp8_ext.checkpoint import compare, fp8, megatron, output  # noqa: E402


@pytest.fixture
def hf(tmp_path):
    return hf_models.make(tmp_path / "hf", hf_models.ALIGNED, shards=2)


@pytest.fixture
def checkpoint(hf, tmp_path):
    megatron.hf_to_megatron(hf, tmp_path / "megatron")
    return tmp_path / "megatron"


def _convert_step_by_step(action, steps, go) -> None:
    """In a child: do a conversion, and wait for permission at every progress, sync and rename."""

    def wait(what):
        steps.send(what)
        go.recv()

    fsync, rename = os.fsync, os.rename
    os.fsync = lambda fd: (wait("sync"), fsync(fd))[1]

    def slow_rename(a, b):
        wait("before rename")
        rename(a, b)
        wait("after rename")

    os.rename = slow_rename
    action(lambda total: lambda nbytes: wait("progress"))
    steps.send("end")


def killed_at(stop: str, count: int, action) -> int:
    """Run `action` in a process and kill -9 it at the `count`-th step named `stop`; return its exit."""
    context = multiprocessing.get_context("fork")
    (ours, steps), (go, theirs) = context.Pipe(False), context.Pipe(False)
    child = context.Process(target=_convert_step_by_step, args=(action, steps, go))
    child.start()
    seen = 0
    while (what := ours.recv()) != "end":
        seen += what == stop
        if seen == count:
            os.kill(child.pid, signal.SIGKILL)
            break
        theirs.send(None)
    child.join()
    return child.exitcode


@pytest.mark.parametrize(
    ("stop", "count"),
    [("progress", 1), ("progress", 9), ("sync", 1), ("sync", 3), ("before rename", 1), ("after rename", 1)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["fp8", "megatron", "hf"])
def test_kill_9_leaves_nothing_or_all(hf, checkpoint, tmp_path, kind, stop, count):
    out = tmp_path / "out"
    action = {
        "fp8": lambda p: fp8.hf_to_fp8(hf, out, progress=p, shard_bytes=600_000),
        "megatron": lambda p: megatron.hf_to_megatron(hf, out, progress=p),
        "hf": lambda p: megatron.megatron_to_hf(checkpoint, out, hf, progress=p),
    }[kind]
    assert killed_at(stop, count, action) == -signal.SIGKILL
    if stop == "after rename":
        assert check_complete(kind, hf, out)
        return
    assert not out.exists()
    left = [p.name for p in tmp_path.iterdir() if p.name not in ("hf", "megatron")]
    assert len(left) == 1 and left[0].startswith(".out.partial-")
    action(None)  # the next run cleans up and succeeds
    assert check_complete(kind, hf, out)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]


def check_complete(kind: str, hf: Path, out: Path) -> bool:
    if kind == "fp8":
        return compare.compare(hf, out).passes(min_sqnr=25)
    return compare.compare(hf, out).passes(bitwise=True)


def test_another_running_conversion_is_left_alone(hf, tmp_path):
    theirs = tmp_path / f".out.partial-{output.socket.gethostname()}-{os.getpid()}"
    theirs.mkdir()
    output._remove_abandoned(tmp_path / "out")
    assert theirs.exists(), "its process lives"


# --- Memory


MEASURE = """
import resource, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from megatron_fp8_ext.checkpoint import fp8, megatron, mapping, huggingface, torch_dist
from torch.distributed.checkpoint import filesystem, metadata
folder = Path({folder!r})
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
{warm_up}
before = peak()
{action}
print("GREW", peak() - before)
"""
ACTIONS = {
    "hf to fp8": "fp8.hf_to_fp8(folder / 'hf', folder / 'fp8', shard_bytes={shard})",
    "hf to megatron": "megatron.hf_to_megatron(folder / 'hf', folder / 'mg')",
    "megatron to hf": "megatron.megatron_to_hf(folder / 'mg', folder / 'back', folder / 'hf', "
    "shard_bytes={shard})",
    "fp8 to hf": "fp8.fp8_to_hf(folder / 'fp8', folder / 'bf16', shard_bytes={shard})",
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's peak memory")
def test_memory_is_below_two_shards(tmp_path):
    """7B's proportions at about 1/75 of its size; the full size is measured in docs/conversion.md."""
    shard = 50_000_000
    config = hf_models.ALIGNED | {
        "hidden_size": 1024, "intermediate_size": 5376, "num_hidden_layers": 4,
        "num_attention_heads": 8, "vocab_size": 16384,
    }  # fmt: skip
    total = sparse_model(tmp_path / "hf", config)
    assert total > 3 * shard
    (tmp_path / "small").mkdir()
    sparse_model(tmp_path / "small" / "hf", hf_models.ALIGNED)
    for action in ACTIONS.values():
        # Once with a small model, so that what torch itself allocates at first use does not count.
        code = MEASURE.format(
            root=str(ROOT),
            folder=str(tmp_path),
            action=action.format(shard=shard),
            warm_up=action.format(shard=shard).replace("folder", "(folder / 'small')"),
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        grew = int(done.stdout.split()[-1])
        print(
            f"{action}: {grew / 1e6:.0f} MB, shard {shard / 1e6:.0f} MB, model {total / 1e6:.0f} MB"
        )
        assert grew < 2 * shard, action


def sparse_model(path: Path, config: dict) -> int:
    """A folder of zeros that takes no disk."""
    from megatron_fp8_ext.checkpoint.safetensors import FileWriter

    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    specs = {name: (torch.bfloat16, shape) for name, shape in hf_models.shapes(config).items()}
    writer = FileWriter(path / "model.safetensors", specs)
    writer._missing.clear()
    writer.close()
    return (path / "model.safetensors").stat().st_size
