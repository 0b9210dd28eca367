"""evalscope in an environment of its own: where it is, how it is made, and what it is told.

It brings about 130 packages, transformers and numpy among them, so it never enters the environment
that trains.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.evaluation import sandbox
from megatron_fp8_ext.evaluation.benchmarks import Benchmark

VERSION = "1.14.1"
VARIABLE = "MEGATRON_FP8_EVALSCOPE"
_RUNNER = Path(__file__).with_name("runner.py")
_TIMEOUT_S = 18000  # the reference's, for one answer


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked of the model for one benchmark.

    Attributes:
        samples: answers to each question.
        max_tokens: longest answer, in tokens.
        temperature, top_p: of sampling.
        batch: requests in flight.
        limit: first questions only; None for all.
        system_prompt: put before each question; None keeps evalscope's own (LiveCodeBench has one).
    """

    samples: int
    max_tokens: int
    temperature: float
    top_p: float
    batch: int
    limit: int | None = None
    system_prompt: str | None = None


def settings(benchmark: Benchmark, **given: Any) -> Settings:
    """Return the reference's settings, with what the user gave (None: not given) in their place."""
    names = ("samples", "max_tokens", "temperature", "top_p", "batch")
    chosen = {name: getattr(benchmark, name) for name in names}
    chosen |= {name: value for name, value in given.items() if value is not None}
    for name in ("samples", "max_tokens", "batch"):
        if chosen[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} {chosen[name]}: must be at least 1")
    if chosen["temperature"] == 0 and chosen["samples"] > 1:
        raise UserError(
            f"--temperature 0 gives the same answer {chosen['samples']} times: add --samples 1"
        )
    return Settings(**chosen)


def task(
    benchmark: Benchmark,
    chosen: Settings,
    *,
    served_name: str,
    data: Path | None,
    work: Path,
    hub: str = "modelscope",
) -> dict[str, Any]:
    """Return the keyword arguments of evalscope's TaskConfig: the exact call, as plain data.

    Args:
        benchmark: what to run.
        chosen: its settings.
        served_name: the model's name at the server.
        data: folder of the local copy of the questions; None lets evalscope download them.
        work: evalscope's folder for this benchmark.
        hub: `modelscope` or `huggingface`, where to download from.
    """
    arguments: dict[str, Any] = {}
    if data is not None:
        arguments |= {"local_path": str(data), "subset_list": ["default"]}
    elif benchmark.runs_code:
        arguments["subset_list"] = ["release_v5"]
    if benchmark.strip_thinking:
        arguments["filters"] = {"remove_until": "</think>"}
    if chosen.system_prompt is not None:
        arguments["system_prompt"] = chosen.system_prompt
    if benchmark.dates:
        start, end = benchmark.dates
        arguments["extra_params"] = {"start_date": start, "end_date": end}
    call: dict[str, Any] = {
        "model": served_name,
        "model_id": "model",
        # Address and key come in the environment: see runner.py.
        "api_url": None,
        "api_key": None,
        "eval_type": "openai_api",
        "datasets": [benchmark.evalscope],
        "dataset_args": {benchmark.evalscope: arguments},
        "dataset_hub": hub,
        "repeats": chosen.samples,
        "eval_batch_size": chosen.batch,
        "generation_config": {
            "temperature": chosen.temperature,
            "top_p": chosen.top_p,
            "max_tokens": chosen.max_tokens,
            "timeout": _TIMEOUT_S,
            "retries": 2,
            "retry_interval": 2,
        },
        "limit": chosen.limit,
        "judge": {"strategy": "rule"},
        "work_dir": str(work),
        "no_timestamp": True,
    }
    if (work / "configs" / "task_config.yaml").is_file():
        call["use_cache"] = str(work)
    if benchmark.runs_code:
        call["sandbox"] = {
            "enabled": True,
            "engine": "docker",
            "default_config": dict(sandbox.CONFIG),
        }
    return call


def managed_folder() -> Path:
    """Return where `megatron-fp8 eval setup` makes the environment."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "megatron-fp8-ext" / f"evalscope-{VERSION}"


def python_of(given: str | None = None) -> Path:
    """Return the Python of evalscope's environment.

    Looks at `given`, MEGATRON_FP8_EVALSCOPE (each a Python or an environment's folder), and the
    managed environment, in this order.

    Raises:
        UserError: there is none; names the command that makes it.
    """
    for source, place in (("--evalscope", given), (VARIABLE, os.environ.get(VARIABLE))):
        if place:
            path = Path(place)
            python = path / "bin" / "python" if path.is_dir() else path
            if not os.access(python, os.X_OK):
                raise UserError(f"{source} {place}: no Python there; give an environment's folder")
            return python.absolute()
    python = managed_folder() / "bin" / "python"
    if python.is_file():
        return python
    raise UserError(
        f"evalscope {VERSION} is not installed: run `megatron-fp8 eval setup` once (an environment "
        f"of its own, 1.2 GB), or name one with --evalscope or {VARIABLE}"
    )


def installed(python: Path) -> dict[str, str]:
    """Return the versions of evalscope and its scoring packages in an environment.

    Raises:
        UserError: no evalscope there.
    """
    done = subprocess.run(
        [str(python), "-I", str(_RUNNER), "versions", "-"], capture_output=True, text=True
    )
    found: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    if "evalscope" not in found:
        raise UserError(f"{python}: no evalscope there; pip install evalscope=={VERSION} into it")
    return found


def set_up(folder: Path) -> Path:
    """Make the environment with pip, from the index that pip is configured for; return its Python.

    Raises:
        UserError: pip failed.
    """
    if (folder / "bin" / "python").exists():
        raise UserError(f"{folder} exists already: delete it to make it anew")
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        venv.create(partial, with_pip=True, symlinks=True)
        pip = [str(partial / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        done = subprocess.run(
            [*pip, "install", f"evalscope[sandbox]=={VERSION}"], stdout=sys.stderr
        )
        if done.returncode:
            raise UserError(f"pip could not install evalscope {VERSION}; its message stands above")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / "bin" / "python"


def environment(work: Path, offline: bool) -> dict[str, str]:
    """Return the variables for evalscope: caches below `work`, no hub unless asked for."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "EVALSCOPE_"))}
    inherited |= {
        "HF_DATASETS_CACHE": str(work / "datasets-cache"),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "DO_NOT_TRACK": "1",
        sandbox.VARIABLE: sandbox.label(work),
    }
    if offline:
        inherited |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return inherited


def check(python: Path, call: Mapping[str, Any], work: Path, offline: bool) -> dict[str, Any]:
    """Have evalscope's own classes validate the call, load the data and render every prompt.

    Where the answers are programs, one is run in a container that is made as theirs will be.

    Returns `versions`, `samples` (questions times repeats), `prompts` (messages of each question)
    and `hashes` (of each prompt).

    Raises:
        UserError: evalscope refuses the call or the data.
    """
    work.mkdir(parents=True, exist_ok=True)
    asked, answered = work / "call.json", work / "check.json"
    asked.write_text(json.dumps(call, indent=1))
    done = subprocess.run(
        [str(python), "-I", str(_RUNNER), "check", str(asked), str(answered)],
        capture_output=True,
        text=True,
        errors="replace",
        env=environment(work, offline),
    )
    if done.returncode:
        said = [x for x in done.stderr.splitlines() if x.strip()]
        refused = [x for x in said if x.startswith("evalscope refuses")]
        raise UserError(f"{call['datasets'][0]}: {(refused or said or ['no message'])[-1][:1000]}")
    found: dict[str, Any] = json.loads(answered.read_text())
    return found


def run_command(python: Path, work: Path, call: Mapping[str, Any]) -> list[str]:
    """Write the call to `work/call.json`; return the command that runs it."""
    asked = work / "call.json"
    asked.write_text(json.dumps(call, indent=1))
    return [str(python), "-I", str(_RUNNER), "run", str(asked)]
