"""Where the slime checkouts are, and how a check runs inside one: a process of its own, on its path."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fp8_ext.slime_plugin import checkout

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
    clean |= {"PYTHONPATH": os.pathsep.join(path), "RAY_AUTH_MODE": "disabled", **env}
    clean.pop("SLIME_PATH", None)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *argv],
        capture_output=True, text=True, timeout=300, env=clean, cwd="/",
    )  # fmt: skip
