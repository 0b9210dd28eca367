"""A plan as commands and files for torchrun, Slurm or Ray. Pure; what is printed is what runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_fp8_ext.launch import secrets
from megatron_fp8_ext.launch.plan import Plan
from megatron_fp8_ext.megatron_plugin.arguments import has
from megatron_fp8_ext.megatron_plugin.flags import EMULATE

ENTRY = "megatron_fp8_ext.megatron_plugin.pretrain_gpt"
DASHBOARD = "http://127.0.0.1:8265"
_EXTERNAL = "--rollout-external-engine-addrs"


@dataclass(frozen=True)
class Step:
    """One command: its words, the variables it adds, and a line that says what it is for."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class Launch:
    """Commands in their order, and the files they read, by path."""

    steps: tuple[Step, ...]
    files: Mapping[str, str] = field(default_factory=dict)


def launch(plan: Plan) -> Launch:
    """Render a plan for its launcher."""
    if plan.launcher == "torchrun":
        run = Step(torchrun(plan), plan.environment)
        # A single machine says at once what it lacks; of several, one would wait for the others.
        return Launch((_preflight(doctor(plan)), run) if plan.nodes > 1 else (run,))
    if plan.launcher == "ray":
        return Launch(_ray(plan))
    from megatron_fp8_ext.launch import slurm

    path = f"{plan.output}/{plan.request.preset.name}.sbatch"
    return Launch((Step(("sbatch", path)),), {path: slurm.sbatch(plan)})


def doctor(plan: Plan) -> tuple[str, ...]:
    """Return the preflight command of one node, with what RL serves and how it is cut."""
    words = ("megatron-fp8", "doctor", *_needs(plan))
    return ("env", f"SLIME_PATH={plan.slime}", *words) if plan.slime else words


def _needs(plan: Plan) -> tuple[str, ...]:
    words = []
    if not has(plan.argv, EMULATE):
        words += ["--gpus", str(plan.gpus)]
    if plan.trainer == "slime":
        serves = plan.request.preset.stage == "rl" and not has(plan.argv, _EXTERNAL)
        gpus = plan.value("--rollout-num-gpus-per-engine", "1") if serves else "0"
        words += ["--slime", "--engine-gpus", gpus]
    if plan.request.preset.stage == "rl":
        words += ["--hf-checkpoint", plan.value("--hf-checkpoint")]
        words += ["--tensor-parallel", plan.value("--tensor-model-parallel-size", "1")]
    return tuple(words)


def _preflight(words: tuple[str, ...]) -> Step:
    return Step(
        words, why="preflight of this node: stops here, with the mend, where training would fail"
    )


def _cluster_preflight(plan: Plan, address: str) -> Step:
    """The preflight as a job of the cluster, without the recipe's variables: `doctor` looks for strays."""
    words = ("python3", "-m", "megatron_fp8_ext.cli", "doctor", "--every-node")
    total = ("--cluster-gpus", str(plan.world_size))
    return Step(
        _job(address, _places(plan), (*words, *total, *_needs(plan))),
        why="preflight of every node of the cluster that has GPUs: stops here, naming node and mend",
    )


def _job(address: str, variables: Mapping[str, str], command: tuple[str, ...]) -> tuple[str, ...]:
    """Return the submission of a job. Variables only, no upload of a working folder."""
    environment = json.dumps({"env_vars": dict(variables)})
    return (
        "ray", "job", "submit", "--address", address, "--runtime-env-json", environment, "--", *command,
    )  # fmt: skip


def program(plan: Plan) -> tuple[str, ...]:
    """Return the entry script as torchrun takes it."""
    if plan.request.megatron:
        return ("-m", "megatron_fp8_ext", f"{plan.request.megatron.rstrip('/')}/pretrain_gpt.py")
    return ("-m", ENTRY)


def torchrun(plan: Plan) -> tuple[str, ...]:
    """Return the torchrun command that every node of the job runs."""
    where: tuple[str, ...] = ("--standalone",)  # a free port of this machine
    if plan.nodes > 1 or plan.request.rdzv_endpoint:
        where = (
            "--nnodes", str(plan.nodes), "--rdzv-backend", "c10d", "--rdzv-id", plan.request.preset.name,
            "--rdzv-endpoint", plan.request.rdzv_endpoint or "HOST:29400",
        )  # fmt: skip
    return ("torchrun", *where, "--nproc-per-node", str(plan.gpus), *program(plan), *plan.argv)


def slime_job(plan: Plan, address: str = DASHBOARD) -> tuple[str, ...]:
    """Return the submission of training: our launcher, which checks what it is given, over slime's script."""
    script = "train.py" if plan.request.preset.stage == "rl" else "train_async.py"
    command = ("python3", "-m", "megatron_fp8_ext.slime_plugin", script, *plan.argv)
    return _job(address, {**plan.environment, **_places(plan)}, command)


def _places(plan: Plan) -> dict[str, str]:
    """Where slime and Megatron are, before what the nodes have on their path already."""
    slime = (plan.slime or "/path/to/slime").rstrip("/")
    folders = filter(None, (slime, plan.request.megatron))
    return {"SLIME_PATH": slime, "PYTHONPATH": ":".join((*folders, "${PYTHONPATH}"))}


def _ray(plan: Plan) -> tuple[Step, ...]:
    # Several nodes are never a Ray of this machine; `checks` asks for the address.
    address = plan.request.ray_address or ("http://HEAD:8265" if plan.nodes > 1 else None)
    if address is not None:
        return (_cluster_preflight(plan, address), Step(slime_job(plan, address)))
    start = Step(
        ("ray", "start", "--head", "--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1",
         "--dashboard-port", "8265", "--num-gpus", str(plan.gpus), "--disable-usage-stats"),
        why="a Ray of this machine alone, its dashboard on loopback (its job API runs any code it is "
        "sent); `ray stop` ends it",
    )  # fmt: skip
    return (_preflight(doctor(plan)), start, Step(slime_job(plan)))


def shell(launched: Launch, known: Sequence[str] = ()) -> str:
    """Return the launch as shell text to paste; secrets, `known` ones included, are blotted out."""
    lines: list[str] = []
    for path, content in launched.files.items():
        folder = path.rpartition("/")[0]
        lines += [f"mkdir -p {shlex.quote(folder)}", f"cat > {shlex.quote(path)} <<'SBATCH'"]
        lines += [secrets.mask(content.rstrip("\n"), known), "SBATCH"]
    for step in launched.steps:
        # Pasted, a preflight that fails must end there too.
        then = "" if step is launched.steps[-1] else " &&"
        if step.why:
            lines.append(f"# {step.why}")
        exports = "" if step is launched.steps[0] else " &&"
        lines += [
            f"export {name}={shlex.quote(_shown(name, value, known))}{exports}"
            for name, value in step.environment.items()
        ]
        lines.append(wrapped(step.argv, known=known) + then)
    return "\n".join(lines)


def _shown(name: str, value: str, known: Sequence[str]) -> str:
    return secrets.HIDDEN if secrets.is_secret(name) else secrets.mask(value, known)


def wrapped(argv: Sequence[str], indent: str = "    ", known: Sequence[str] = ()) -> str:
    """Return a command over several lines, one flag a line."""
    lines: list[list[str]] = [[]]
    for token in secrets.masked(argv, known):
        if token.startswith("-") and token != "-m" and len(lines[-1]) > 0:
            lines.append([])
        lines[-1].append(shlex.quote(token))
    return f" \\\n{indent}".join(" ".join(line) for line in lines)
