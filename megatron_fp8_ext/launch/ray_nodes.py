"""`megatron-fp8 doctor` on every node of a running Ray cluster, before a job is submitted to it.

It runs as a job of that cluster, because a job sees what training will see: the nodes' own Python and
files, and the variables of the job; and because of a cluster a user may reach the dashboard alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fp8_ext.errors import UserError

# Seconds for a node to answer: its first import of torch may come from a slow shared disk.
PATIENCE = 600.0
# Older versions of Ray hide the GPUs of a node from a task that asks for none.
_SHOW_GPUS = {
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class Node:
    """A living node: Ray's id of it, its address, and the GPUs that Ray counts there."""

    id: str
    address: str
    gpus: int


def report(words: Sequence[str], cluster_gpus: int) -> int:
    """Examine every node, print a line for each and one for each failure; return the exit code.

    Args:
        words: arguments of `megatron-fp8 doctor` for a node.
        cluster_gpus: GPUs that the cluster must have in all; a job with fewer would wait for ever.

    Raises:
        UserError: Ray is not installed, or no cluster runs.
    """
    nodes = _connect()
    broken: list[str] = []
    have = sum(node.gpus for node in nodes)
    if have < cluster_gpus:
        broken.append(
            f"the cluster: {have} GPUs, and this run waits for {cluster_gpus}: start more nodes"
        )
    for node, answer in zip(nodes, _answers(nodes, words), strict=True):
        failed = failures(answer)
        level, gpus = "FAIL" if failed else "ok  ", "GPU" if node.gpus == 1 else "GPUs"
        print(f"{level} {node.address}, {node.gpus} {gpus}: {_found(answer)}", flush=True)
        broken += [f"{node.address}: {reason}" for reason in failed]
    for reason in broken:
        print(f"megatron-fp8: doctor: {reason}", file=sys.stderr, flush=True)
    return 1 if broken else 0


def chosen(rows: Sequence[dict[str, Any]]) -> list[Node]:
    """Return the living nodes with GPUs, or all living ones where none has any, of `ray.nodes()`."""
    alive = [
        Node(row["NodeID"], row["NodeManagerAddress"], int(row["Resources"].get("GPU", 0)))
        for row in rows
        if row["Alive"]
    ]
    return [node for node in alive if node.gpus] or alive


def failures(answer: tuple[int, str, str]) -> list[str]:
    """Return why a node cannot train, a line each.

    Args:
        answer: exit code, output and errors of `doctor --json` there.
    """
    code, output, errors = answer
    rows = _rows(output)
    failed = [
        ": ".join(filter(None, (r["subject"], r["found"], r["mend"])))
        for r in rows
        if r["level"] == "fail"
    ]
    if failed or code == 0:
        return failed
    last = [line for line in (errors or output).splitlines() if line.strip()][-1:]
    missing = (
        "; pip install megatron-fp8-ext on every node" if "No module named" in "".join(last) else ""
    )
    return [f"doctor ended with exit code {code}: {''.join(last) or 'it said nothing'}{missing}"]


def _rows(output: str) -> list[dict[str, str]]:
    """The findings: the last line of the output (libraries may print before it)."""
    try:
        return list(json.loads(output.splitlines()[-1]))
    except (ValueError, IndexError):
        return []


def _found(answer: tuple[int, str, str]) -> str:
    """What trains there, in a few words."""
    shown = ("Python", "torch", "Megatron", "TransformerEngine", "ray", "sglang")
    return ", ".join(
        f"{r['subject']} {r['found']}" for r in _rows(answer[1]) if r["subject"] in shown
    )


def _connect() -> list[Node]:
    try:
        import ray
    except ImportError:
        raise UserError("--every-node needs Ray: pip install ray") from None
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="error")
    except ConnectionError:
        raise UserError(
            "--every-node: no Ray cluster runs here; start one, or give RAY_ADDRESS"
        ) from None
    return chosen(ray.nodes())


def _answers(nodes: Sequence[Node], words: Sequence[str]) -> list[tuple[int, str, str]]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # No CPU and no GPU: a busy cluster answers as well.
    task = ray.remote(num_cpus=0, max_retries=0)(_doctor_here())
    waiting = [
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            runtime_env={"env_vars": _SHOW_GPUS},
        ).remote(list(words), PATIENCE)
        for node in nodes
    ]
    found = []
    for reference in waiting:
        try:
            found.append(ray.get(reference, timeout=PATIENCE + 60))
        except Exception as error:  # a lost node, no answer, no worker: any of them is the reason
            found.append(
                (1, "", f"no answer: {type(error).__name__}: {str(error).splitlines()[0]}")
            )
    return found


def _doctor_here() -> Any:
    """The task of a node. A closure, which Ray sends by value: nodes without this package answer too."""

    def doctor(words: list[str], patience: float) -> tuple[int, str, str]:
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "megatron_fp8_ext.cli",
            "doctor",
            "--json",
            *words,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience)
        return done.returncode, done.stdout, done.stderr

    return doctor
