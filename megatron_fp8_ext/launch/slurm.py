"""A plan as an sbatch file that a person can read, and that Slurm may start again at any time."""

from __future__ import annotations

import shlex

from megatron_fp8_ext.launch import render
from megatron_fp8_ext.launch.plan import Plan

# Time kept back from the job's limit, so that the last checkpoint is written before Slurm ends it.
_MARGIN_MINUTES = 20


def sbatch(plan: Plan) -> str:
    """Return the file's text."""
    slurm, name = plan.request.slurm, plan.request.preset.name
    options = {
        "job-name": name,
        "nodes": plan.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": plan.gpus,
        "exclusive": None,
        "time": slurm.minutes,
        "partition": slurm.partition or False,
        "account": slurm.account or False,
        "output": f"{plan.output}/slurm-%j.log",
        "open-mode": "append",
        "requeue": None,
        "signal": f"B:USR1@{_MARGIN_MINUTES * 60}" if plan.trainer == "slime" else False,
    }
    head = [
        f"#SBATCH --{key}" + ("" if value is None else f"={value}")
        for key, value in options.items()
        if value is not False
    ]
    container = f" --container-image={shlex.quote(slurm.container)}" if slurm.container else ""
    lines = [
        "#!/usr/bin/env bash",
        *head,
        f"# {name}: {plan.request.preset.summary}",
        "# Safe to requeue: each start continues from the last checkpoint in the run's own folder.",
        "set -euo pipefail",
        f"SRUN=(srun --kill-on-bad-exit=1{container})",
        "HEAD=$(scontrol show hostnames \"$SLURM_JOB_NODELIST\" | head -n 1)",
        *(f"export {key}={shlex.quote(value)}" for key, value in plan.environment.items()),
        "",
        "# Preflight on every node: stops here, with the mend, where training would fail.",
        f'"${{SRUN[@]}}" {shlex.join(render.doctor(plan))}',
        "",
    ]  # fmt: skip
    body = _megatron(plan) if plan.trainer == "megatron" else _slime(plan)
    return "\n".join([*lines, *body]) + "\n"


def _megatron(plan: Plan) -> list[str]:
    tracker = shlex.quote(f"{plan.save}/latest_checkpointed_iteration.txt")
    minutes = max(plan.request.slurm.minutes - _MARGIN_MINUTES, 1)
    command = (
        "torchrun", "--nnodes", str(plan.nodes), "--nproc-per-node", str(plan.gpus),
        "--rdzv-backend", "c10d", "--rdzv-id", "$SLURM_JOB_ID", "--rdzv-endpoint", "$HEAD:29400",
        *render.program(plan), *plan.flags, "--exit-duration-in-mins", str(minutes),
    )  # fmt: skip
    text = render.wrapped(command).replace("'$SLURM_JOB_ID'", '"$SLURM_JOB_ID"')
    text = text.replace("'$HEAD:29400'", '"$HEAD:29400"')
    lines = _saved(tracker)
    if plan.start != plan.resume:
        lines += [
            'if [ "$before" = 0 ]; then',
            f"    LOAD=({shlex.join(plan.start)})",
            "else",
            f"    LOAD=({shlex.join(plan.resume)})",
            "fi",
        ]
    else:
        lines.append(f"LOAD=({shlex.join(plan.start)})")
    lines += [f'"${{SRUN[@]}}" {text} \\', '    "${LOAD[@]}"']
    total = plan.value("--train-iters")
    if total.isdigit():
        lines += [
            "",
            "# Out of time, not done, and further than before: once more.",
            "after=$(saved)",
            f'if [ "$after" -lt {total} ] && [ "$after" -gt "$before" ]; then',
            '    scontrol requeue "$SLURM_JOB_ID"',
            "fi",
        ]
    return lines


def _saved(tracker: str) -> list[str]:
    return [f"saved() {{ cat {tracker} 2>/dev/null || echo 0; }}", "before=$(saved)"]


def _slime(plan: Plan) -> list[str]:
    command = render.wrapped(render.slime_job(plan))
    tracker = shlex.quote(f"{plan.save}/latest_checkpointed_iteration.txt")
    return [
        *_saved(tracker),
        f"# Slurm's signal, {_MARGIN_MINUTES} minutes before the end: once more, if further than before.",
        "again() {",
        '    if [ "$(saved)" -gt "$before" ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        "}",
        "trap again USR1",
        "",
        "# One Ray cluster inside this job. Its nodes talk over the cluster's network; the dashboard, whose",
        "# job API runs any code it is sent, listens on the head's loopback only.",
        'HEAD_IP=$(srun --nodes=1 --ntasks=1 -w "$HEAD" hostname -i | cut -d" " -f1)',
        f'srun --nodes=1 --ntasks=1 --overlap -w "$HEAD" ray start --head --block --port=6379 '
        f'--node-ip-address="$HEAD_IP" --dashboard-host=127.0.0.1 --dashboard-port=8265 '
        f"--num-gpus={plan.gpus} --disable-usage-stats &",
        "sleep 20",
        f'[ "$SLURM_JOB_NUM_NODES" -eq 1 ] || srun --overlap --nodes={max(plan.nodes - 1, 1)} '
        f'--ntasks={max(plan.nodes - 1, 1)} -x "$HEAD" ray start --block --address="$HEAD_IP:6379" '
        f"--num-gpus={plan.gpus} --disable-usage-stats &",
        "sleep 20",
        "# Ray fills ${PYTHONPATH} in, on each node.",
        "# shellcheck disable=SC2016",
        f'srun --nodes=1 --ntasks=1 --overlap -w "$HEAD" {command} &',
        "job=$!",
        'wait "$job" || { code=$?; [ "$code" -gt 128 ] && wait "$job"; }',
    ]
