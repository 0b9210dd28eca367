"""A plan as commands and files for torchrun, Slurm or Ray. Pure; what is printed is what runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_fp8_ext.launch import secrets
from megatron_fp8_ext.launch.plan import Plan

ENTRY = "megatron_fp8_ext.megatron_plugin.pretrain_gpt"
_DASHBOARD = "http://127.0.0.1:8265"


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
    """Return the preflight command, with what RL serves and how it is cut."""
    if plan.trainer == "megatron":
        return ("megatron-fp8", "doctor")
    words = ["megatron-fp8", "doctor", "--slime"]
    if plan.request.preset.stage == "rl":
        words += ["--hf-checkpoint", plan.value("--hf-checkpoint")]
        words += ["--engine-gpus", plan.value("--rollout-num-gpus-per-engine", "1")]
        words += ["--tensor-parallel", plan.value("--tensor-model-parallel-size", "1")]
    folder = plan.request.slime or plan.facts.slime
    return ("env", f"SLIME_PATH={folder}", *words) if folder else tuple(words)


def _preflight(words: tuple[str, ...]) -> Step:
    return Step(
        words, why="preflight of this node: stops here, with the mend, where training would fail"
    )


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


def slime_command(plan: Plan) -> tuple[str, ...]:
    """Return the command that a Ray job runs on the head node."""
    folder = plan.request.slime or plan.facts.slime or "/path/to/slime"
    script = "train.py" if plan.request.preset.stage == "rl" else "train_async.py"
    return ("python3", f"{folder.rstrip('/')}/{script}", *plan.argv)


def runtime_environment(plan: Plan) -> str:
    """Return the JSON of Ray's runtime environment: variables only, no upload of a working folder."""
    variables = dict(plan.environment)
    folders = [f for f in (plan.request.slime or plan.facts.slime, plan.request.megatron) if f]
    if folders:
        variables["PYTHONPATH"] = ":".join(folders)
    return json.dumps({"env_vars": variables})


def _ray(plan: Plan) -> tuple[Step, ...]:
    address = plan.request.ray_address or _DASHBOARD
    submit = Step(
        ("ray", "job", "submit", "--address", address, "--runtime-env-json",
         runtime_environment(plan), "--", *slime_command(plan)),
    )  # fmt: skip
    if plan.request.ray_address is not None:
        return (submit,)
    start = Step(
        ("ray", "start", "--head", "--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1",
         "--dashboard-port", "8265", "--num-gpus", str(plan.gpus), "--disable-usage-stats"),
        why="a Ray of this machine alone, bound to loopback (its job API runs any code it is sent); "
        "`ray stop` ends it",
    )  # fmt: skip
    return (_preflight(doctor(plan)), start, submit)


def shell(launched: Launch, known: Sequence[str] = ()) -> str:
    """Return the launch as shell text to paste; secrets, `known` ones included, are blotted out."""
    lines: list[str] = []
    for path, content in launched.files.items():
        folder = path.rpartition("/")[0]
        lines += [f"mkdir -p {shlex.quote(folder)}", f"cat > {shlex.quote(path)} <<'SBATCH'"]
        lines += [secrets.mask(content.rstrip("\n"), known), "SBATCH"]
    for step in launched.steps:
        if step.why:
            lines.append(f"# {step.why}")
        lines += [
            f"export {name}={shlex.quote(_shown(name, value, known))}"
            for name, value in step.environment.items()
        ]
        lines.append(wrapped(step.argv, known=known))
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
