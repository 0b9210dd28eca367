"""Look at the world for a plan, and start what was planned: the only file here with side effects."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.launch import architecture, secrets
from megatron_fp8_ext.launch.plan import Facts, Plan, split_checkpoint
from megatron_fp8_ext.launch.render import Launch, Step
from megatron_fp8_ext.launch.request import Request

RECORD = "run.json"


def facts(request: Request) -> Facts:
    """Read what the plan depends on: the model's config.json and the trackers of checkpoints."""
    config: dict[str, Any] | None = None
    model = request.inputs.get("model")
    if model and (Path(model) / "config.json").is_file():
        config = architecture.read_config(model)
    output = request.inputs.get("output", f"exp/{request.preset.experiment}")
    save = request.overrides.get("save")
    root = save.value if save is not None else f"{output}/checkpoints"
    init = request.inputs.get("init")
    return Facts(
        config=config,
        saved_iteration=_last(root),
        init_iteration=_last(split_checkpoint(init)[0]) if init else None,
        slime=_slime(),
        secrets=secrets.values(os.environ),
    )


def _last(root: str) -> int | None:
    """The iteration that a checkpoint folder's tracker names; 0 for a release, None without one."""
    try:
        text = (Path(root) / "latest_checkpointed_iteration.txt").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else 0 if text == "release" else None


def _slime() -> str | None:
    """The checkout of an editable slime: its train.py is not part of the package."""
    try:
        spec = importlib.util.find_spec("slime")
    except (ImportError, ValueError):
        return None
    for place in spec.submodule_search_locations or () if spec is not None else ():
        if (Path(place).parent / "train.py").is_file():
            return str(Path(place).parent)
    return None


def record(plan: Plan) -> str:
    """Return what run.json keeps of a run, for `watch` and for the next stage. Holds no secret."""
    return json.dumps(
        {
            "preset": plan.request.preset.name,
            "stage": plan.request.preset.stage,
            "model": plan.request.inputs.get("model"),
            "save": plan.save,
            "world_size": plan.world_size,
            "flags": secrets.masked(plan.argv, plan.facts.secrets),
        },
        indent=1,
    )


def read_record(folder: str) -> dict[str, Any]:
    """Return the record of an earlier run.

    Raises:
        UserError: `folder` is not the output of a run, or its record is damaged.
    """
    path = Path(folder) / RECORD
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no {RECORD}: give the output folder of a `megatron-fp8 run`"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); give --init and --model instead"
        ) from error
    if not isinstance(data, dict) or not {"stage", "save"} <= set(data):
        raise UserError(f"{path} is no record of a run; give --init and --model instead")
    return data


def start(plan: Plan, launched: Launch) -> int:
    """Write the files and run the commands one after the other; return the last exit code.

    Raises:
        UserError: the Ray cluster does not answer, the output cannot be written, a program is missing.
    """
    if plan.launcher == "ray" and plan.request.ray_address is not None:
        _answers(plan.request.ray_address)
    output = Path(plan.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        _write(output / RECORD, record(plan))
        for path, content in launched.files.items():
            _write(Path(path), content)
    except OSError as error:
        raise UserError(f"--output {plan.output} cannot be written: {error.strerror}") from error
    for left, step in zip(reversed(range(len(launched.steps))), launched.steps, strict=True):
        code = _run(step)
        if code:
            if left:
                what = step.why.partition(":")[0] or step.argv[0]
                print(
                    f"megatron-fp8: error: {what} failed; training was not started", file=sys.stderr
                )
            return code
    return 0


def _answers(address: str) -> None:
    if not address.startswith(("http://", "https://")):
        return  # another of Ray's forms, which its own client reads
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=10).close()
    except urllib.error.HTTPError:
        return  # it is there, and may ask for a token
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"--ray-address {address}: no Ray dashboard answers there ({reason}); start the cluster, or "
            "give its dashboard: http://HEAD:8265"
        ) from error


def _run(step: Step) -> int:
    argv = list(step.argv)
    own = {"torchrun": "torch.distributed.run", "megatron-fp8": "megatron_fp8_ext.cli"}
    for name, module in own.items():  # of this Python, on PATH or not
        if name in argv[:3]:
            at = argv.index(name)
            argv[at : at + 1] = [sys.executable, "-m", module]
    try:
        process = subprocess.Popen(argv, env={**os.environ, **step.environment})
    except FileNotFoundError:
        raise UserError(f"{argv[0]} is not installed here, or not on PATH") from None
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the terminal sent it to the child as well, which ends by itself


def _write(path: Path, content: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
