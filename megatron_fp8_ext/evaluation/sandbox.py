"""Where LiveCodeBench's programs run: Docker containers made by container.py, seen from our side."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

from megatron_fp8_ext.evaluation.container import LABEL

VARIABLE = "MEGATRON_FP8_EVAL_LABEL"
# What ms-enclave's DockerSandboxConfig knows; container.arguments adds the rest.
CONFIG: dict[str, Any] = {
    "image": "python:3.11-slim",
    "tools_config": {"python_executor": {}},
    "network_enabled": False,
    "memory_limit": "4g",
    "cpu_limit": 1.0,
    "privileged": False,
    "remove_on_exit": True,
}


def label(work: Path) -> str:
    """Return the label of the containers that serve evalscope's folder `work`."""
    return hashlib.sha256(str(work.absolute()).encode()).hexdigest()[:16]


def removal(work: Path) -> list[str]:
    """Return the command that removes every container labelled for `work`, with its volume."""
    listed = f"docker ps -aq --filter label={LABEL}={label(work)}"
    return ["sh", "-c", f"for each in $({listed}); do docker rm -fv $each; done >/dev/null 2>&1"]


def problem(image: str = str(CONFIG["image"])) -> str | None:
    """Return why no container can be started here; None where one may (`probe` then starts one)."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    try:
        server = subprocess.run(["docker", "info"], capture_output=True, text=True, timeout=60)
        if server.returncode:
            said = (server.stderr.strip().splitlines() or ["no message"])[-1]
            return f"docker has no running daemon here ({said})"
        found = subprocess.run(
            ["docker", "image", "inspect", image], capture_output=True, text=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        return "docker does not answer"
    if found.returncode:
        return f"docker has no image {image} (docker pull {image})"
    return None
