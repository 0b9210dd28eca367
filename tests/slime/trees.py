"""Where the slime checkouts are, and how a check runs inside one: a process of its own, on its path."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fp8_ext.slime_plugin import checkout, sglang

ROOT = Path(__file__).resolve().parent.parent.parent


def found() -> list[Path]:
    """SLIME_PATH (several, separated as in PATH) and third_party/slime."""
    stated = [Path(p) for p in os.environ.get("SLIME_PATH", "").split(os.pathsep) if p]
    return [p for p in (*stated, ROOT / "third_party" / "slime") if (p / "train.py").is_file()]


def params() -> list:
    return [
        pytest.param(p, id="v0.3" if checkout.read(p, "").per_step_batch else "8359c9a")
        for p in found()
    ] or [
        pytest.param(
            None,
            marks=pytest.mark.skip(
                reason="needs a slime checkout: SLIME_PATH or third_party/slime"
            ),
        )
    ]


def engine(tree: Path) -> dict[str, str]:
    """The variables that put an SGLang on the path whose flags this slime can parse.

    The newest that fits 8359c9a does not fit v0.3: SGLANG_8359C9A names a folder that has one.
    """
    v03 = checkout.read(tree, "").per_step_batch
    place = None if v03 else os.environ.get("SGLANG_8359C9A")
    found = importlib.metadata.distributions(name="sglang", **({"path": [place]} if place else {}))
    version = next((x.version for x in found), None)
    fits = sglang.of(v03)
    if version is None or fits.problem(version):
        pytest.skip(
            f"SGLang {version} does not fit slime {'v0.3' if v03 else '8359c9a'}: pip install --no-deps "
            f"--target DIR sglang==0.5.12.post1 and SGLANG_8359C9A=DIR"
        )
    return {"PYTHONPATH": place} if place else {}


def python(tree: Path, code: str, *argv: str, needs: tuple[str, ...] = (), **env: str):
    """Run `code` with the checkout on the path; returns the finished process."""
    for name in ("torch", "megatron", "ray", "transformers", "sglang", *needs):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"slime's code needs {name} (its Python package is enough)")
    path = [str(tree), str(ROOT), str(ROOT / "tests")]
    if not checkout.read(tree, "").per_step_batch:
        megatron = os.environ.get("MEGATRON_LM_PATH")
        if not megatron:
            pytest.skip("slime 8359c9a needs the Megatron-LM of its time: MEGATRON_LM_PATH")
        path.append(megatron)
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("MEGATRON_FP8", "NVTE_", "RAY_"))
    }
    first = env.pop("PYTHONPATH", None)
    path = [first, *path] if first else path
    clean |= {"PYTHONPATH": os.pathsep.join(path), "RAY_AUTH_MODE": "disabled", **env}
    clean.pop("SLIME_PATH", None)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *argv],
        capture_output=True, text=True, timeout=300, env=clean, cwd="/",
    )  # fmt: skip
