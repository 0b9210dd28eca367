"""`megatron-fp8 bench convert`: time and peak memory of every conversion, at a real model's shape.

Each command runs in a process of its own on a synthetic model (random weights, a released model's
shapes), so that its peak is its own. Each file is removed as soon as no later command reads it.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp8_ext import presets
from megatron_fp8_ext.checkpoint import architecture, huggingface, mapping, megatron
from megatron_fp8_ext.checkpoint.architecture import Architecture
from megatron_fp8_ext.checkpoint.torch_dist_writer import TorchDistWriter
from megatron_fp8_ext.errors import UserError

# Runs a command line of `convert` and prints what the kernel says of this process, and of it alone
# (`ru_maxrss` of a child would count the parent's pages before exec).
_CHILD = """
import json, sys, time
from megatron_fp8_ext import cli
began, code = time.monotonic(), 0
try:
    cli.main()
except SystemExit as stop:
    code = stop.code
fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(fields["VmHWM"].split()[0]) * 1024
print(json.dumps({"code": code or 0, "seconds": time.monotonic() - began, "peak": peak}))
"""
_POOL_VALUES = 1 << 24  # random values, tiled over every tensor


@dataclass(frozen=True)
class Row:
    """One command, measured.

    Attributes:
        command: as it was given, folders by their role.
        read: bytes of the tensors it reads.
        seconds: of the process, imports included.
        peak: most resident memory of the process, bytes; libraries included.
    """

    command: str
    read: int
    seconds: float
    peak: int

    @property
    def gigabytes_per_second(self) -> float:
        """Throughput, of bytes read."""
        return self.read / 1e9 / self.seconds


def model(name: str, layers: int | None) -> tuple[Architecture, dict[str, Any]]:
    """Return the architecture of a released model, and a config.json for it.

    Raises:
        UserError: no such model.
    """
    facts = presets.model_facts(name)
    if not facts:
        raise UserError(f"--model {name}: choose Qwen2.5-1.5B or Qwen2.5-7B")
    config = {**facts, "max_position_embeddings": 32768, "torch_dtype": "bfloat16"}
    if layers is not None:
        config["num_hidden_layers"] = layers
    return architecture.from_config(config, name), config


def run(
    name: str, folder: Path, layers: int | None, main_params: bool, device: str
) -> dict[str, Any]:
    """Measure every conversion, and return the record.

    Args:
        name: a released model.
        folder: must not exist; removed at the end.
        layers: fewer than the model has; None for all.
        main_params: also convert a checkpoint with FP32 main parameters (three times the size).
        device: of hf-to-fp8.

    Raises:
        UserError: no room, or a command failed (its output is shown).
    """
    arch, config = model(name, layers)
    nbytes = huggingface.total_bytes(megatron.hf_specs(arch))
    if not Path("/proc/self/status").exists():
        raise UserError("bench convert reads peak memory from /proc: run it on Linux")
    if folder.exists():
        raise UserError(f"{folder} exists; give --folder another place")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(folder.parent).free, (4 if main_params else 3) * nbytes
    if free < needed:
        raise UserError(
            f"--folder {folder}: needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free; give "
            "another place, or fewer --layers"
        )
    folder.mkdir()
    try:
        rows = []
        for row in _measure(arch, config, nbytes, folder, main_params, device):
            print(_line(row), file=sys.stderr, flush=True)  # it takes minutes each
            rows.append(row)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "model": name,
        "layers": arch.num_layers,
        "bytes": nbytes,
        "shard_bytes": huggingface.SHARD_BYTES,
        "device": _device_name(device),
        "versions": {"torch": torch.__version__, "python": platform.python_version(),
                     "megatron-fp8-ext": metadata.version("megatron-fp8-ext")},
        "rows": [asdict(row) | {"gb_s": row.gigabytes_per_second} for row in rows],
    }  # fmt: skip


def _measure(
    arch: Architecture,
    config: dict[str, Any],
    nbytes: int,
    folder: Path,
    main_params: bool,
    device: str,
) -> Iterator[Row]:
    hf, mg, back, fp8, values = (folder / name for name in ("hf", "mg", "back", "fp8", "values"))
    _write_model(hf, arch, config)
    yield _command(nbytes, "hf-to-megatron", hf, mg)
    yield _command(2 * nbytes, "verify", hf, mg, "--bitwise")
    yield _command(nbytes, "megatron-to-hf", mg, back, "--hf-reference", hf)
    shutil.rmtree(mg)
    shutil.rmtree(back)
    yield _command(nbytes, "hf-to-fp8", hf, fp8, "--device", device)
    fp8_bytes = sum(entry.nbytes for entry in huggingface.open_folder(fp8).entries.values())
    yield _command(nbytes + fp8_bytes, "verify", hf, fp8, "--min-sqnr", "20")
    yield _command(fp8_bytes, "fp8-to-hf", fp8, values)
    shutil.rmtree(values)
    shutil.rmtree(fp8)
    if not main_params:
        return
    for file in hf.glob("*.safetensors*"):
        file.unlink()
    _write_trained(mg, arch)
    row = _command(2 * nbytes, "megatron-to-hf", mg, back, "--hf-reference", hf)
    yield replace(row, command=f"{row.command} (FP32 main parameters)")
    yield _command(3 * nbytes, "verify", mg, back, "--bitwise")


def _command(read: int, *argv: str | Path) -> Row:
    words = [str(word) for word in argv]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, "convert", *words], stdout=subprocess.PIPE, text=True
    )
    lines = done.stdout.strip().splitlines()
    found = json.loads(lines[-1]) if done.returncode == 0 and lines else {"code": done.returncode}
    shown = " ".join(word.name if isinstance(word, Path) else word for word in argv)
    if found["code"] != 0:
        raise UserError(
            f"convert {shown} ended with {found['code']}: {lines[-2] if lines[1:] else ''}"
        )
    return Row(f"convert {shown}", read, found["seconds"], found["peak"])


def _random(count: int, pool: Tensor, at: int) -> Tensor:
    """`count` values of the pool from `at` on, again and again: cheap, and no two tensors alike."""
    start = (at * 1_000_003) % (pool.numel() // 2)
    part = pool[start:]
    return part.repeat(-(-count // part.numel()))[:count]


def _pool() -> Tensor:
    generator = torch.Generator().manual_seed(1236)
    return (torch.randn(_POOL_VALUES, generator=generator) * 0.02).to(torch.bfloat16)


def _write_model(folder: Path, arch: Architecture, config: dict[str, Any]) -> None:
    folder.mkdir()
    specs, pool = megatron.hf_specs(arch), _pool()
    writer = huggingface.FolderWriter(folder, specs)
    for at, (name, (_, shape)) in enumerate(specs.items()):
        writer.write(name, _random(torch.Size(shape).numel(), pool, at).reshape(shape))
    writer.finish(config, copy_from=None)


def _write_trained(folder: Path, arch: Architecture) -> None:
    """A checkpoint with weights and FP32 main parameters, as `--dist-ckpt-optim-fully-reshardable`."""
    folder.mkdir()
    writer, pool = TorchDistWriter(folder / "iter_0000001"), _pool()
    for at, unit in enumerate(mapping.units(arch)):
        shape = unit.megatron_shape
        value = _random(torch.Size(shape).numel(), pool, at).reshape(shape)
        writer.tensor(unit.megatron, value, unit.layer, arch.num_layers)
        name = f"optimizer.state.param.{unit.megatron}"
        writer.tensor(name, value.float(), unit.layer, arch.num_layers)
    writer.finish(arch.megatron_arguments())
    (folder / "latest_checkpointed_iteration.txt").write_text("1")


def _device_name(device: str) -> str:
    if device != "cpu" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"CPU, {torch.get_num_threads()} threads"


def markdown(record: dict[str, Any]) -> str:
    """Return the record as a table for people."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"{record['model']}, {record['layers']} layers: {record['bytes'] / 1e9:.2f} GB of BF16, shards of "
        f"{record['shard_bytes'] / 1e9:.0f} GB; {record['device']}; {versions}.",
        "",
        "| command | read | time | throughput | peak memory |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        found = {key: value for key, value in row.items() if key != "gb_s"}
        lines.append(_line(Row(**found)))
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    return (
        f"| `{row.command}` | {row.read / 1e9:.2f} GB | {row.seconds:.0f} s | "
        f"{row.gigabytes_per_second:.2f} GB/s | {row.peak / 1e9:.2f} GB |"
    )
