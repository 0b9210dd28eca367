"""Runs inside evalscope's environment, as a file: `python -I runner.py check|run|rows FILE`.

It imports evalscope and nothing of ours. The address and key of the server come in the environment
(EVALSCOPE_BASE_URL, EVALSCOPE_API_KEY), so that a restart on another port changes neither evalscope's
cache identity nor any file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

_PACKAGES = (
    "evalscope",
    "openai",
    "datasets",
    "math-verify",
    "latex2sympy2_extended",
    "ms-enclave",
)


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide a score."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def schema(names: list[str]) -> dict[str, Any]:
    """Return the keys that evalscope's own configuration classes know."""
    from evalscope.api.benchmark import BenchmarkMeta
    from evalscope.api.model import GenerateConfig
    from evalscope.api.registry import BENCHMARK_REGISTRY, FILTER_REGISTRY
    from evalscope.config import SandboxTaskConfig, TaskConfig

    return {
        "task": sorted(TaskConfig.model_fields),
        "generation_config": sorted(GenerateConfig.model_fields),
        "sandbox": sorted(SandboxTaskConfig.model_fields),
        "dataset_args": sorted(
            {f.name for f in dataclasses.fields(BenchmarkMeta)} | {"local_path"}
        ),
        "filters": sorted(FILTER_REGISTRY.keys()),
        "extra_params": {n: sorted(BENCHMARK_REGISTRY.get(n).extra_params) for n in names},
        "subsets": {n: sorted(BENCHMARK_REGISTRY.get(n).subset_list) for n in names},
    }


def contain(task: dict[str, Any], config: Any) -> types.ModuleType | None:
    """Make sure that only containers run programs; return container.py where the task has any.

    evalscope runs them on this machine where its sandbox is off, and unpickles LiveCodeBench's tests.

    Raises:
        ValueError: the call would run them outside of our container.
    """
    from evalscope.api.mixin import CodeExecutionSandboxMixin
    from evalscope.api.registry import BENCHMARK_REGISTRY

    adapter = BENCHMARK_REGISTRY.get(task["datasets"][0]).data_adapter
    if not issubclass(adapter, CodeExecutionSandboxMixin):
        return None
    from evalscope.benchmarks.live_code_bench import evaluate_utils, load_utils

    given = config.sandbox
    if given is None or not given.enabled or given.engine != "docker" or given.manager_config:
        raise ValueError("programs run in a local Docker container only, which sandbox must say")

    def refuse(*args: Any, **more: Any) -> None:
        raise SystemExit("evalscope was about to run a program outside of its container")

    evaluate_utils.codegen_metrics = refuse
    load_utils.pickle = _beside("unpickle")
    container = _beside("container")
    container.install(os.environ["MEGATRON_FP8_EVAL_LABEL"])
    return container


def _beside(name: str) -> types.ModuleType:
    """Import a neighbour by its file: `-I` keeps this folder, with a datasets.py in it, off the path."""
    file = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(task: dict[str, Any]) -> dict[str, Any]:
    """Validate a task against evalscope, load its data, and return the rendered prompts."""
    from evalscope.api.registry import get_benchmark
    from evalscope.config import TaskConfig

    known = schema(task["datasets"])
    unknown = [f"{key}" for key in task if key not in known["task"]]
    # evalscope accepts any key in the following three without a word.
    for part in ("generation_config", "sandbox"):
        unknown += [f"{part}.{key}" for key in task.get(part) or {} if key not in known[part]]
    for name, given in task["dataset_args"].items():
        unknown += [f"{name}.{key}" for key in given if key not in known["dataset_args"]]
        unknown += [f"filters.{x}" for x in given.get("filters", ()) if x not in known["filters"]]
        extra = known["extra_params"].get(name, ())
        unknown += [f"{name}.{x}" for x in given.get("extra_params", ()) if x not in extra]
    if given := (task.get("sandbox") or {}).get("default_config"):
        from ms_enclave.sandbox.model import DockerSandboxConfig

        fields = DockerSandboxConfig.model_fields  # it drops what it does not know
        unknown += [f"sandbox.default_config.{key}" for key in given if key not in fields]
    if unknown:
        raise ValueError(f"evalscope does not know {', '.join(unknown)}")
    config = TaskConfig(**task)
    if container := contain(task, config):
        label = os.environ["MEGATRON_FP8_EVAL_LABEL"]
        if problem := container.probe(task["sandbox"]["default_config"], label):
            raise ValueError(f"its container is not fit for foreign programs: {problem}")
    (name,) = task["datasets"]
    data = get_benchmark(name, config).load_dataset()
    prompts: dict[int, list[dict[str, str]]] = {}
    for samples in data.values():
        for sample in samples:
            messages = [{"role": m.role, "content": m.text} for m in sample.input]
            prompts.setdefault(sample.group_id, messages)
    return {
        "versions": versions(),
        "samples": sum(len(samples) for samples in data.values()),
        "prompts": [prompts[group] for group in sorted(prompts)],
    }


def rows(file: Path) -> None:
    """Print a parquet file as JSON lines."""
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
        for row in batch.to_pylist():
            print(json.dumps(row, default=str))


def main(argv: list[str]) -> int:
    """Do what the first word says; a failure of evalscope is one line on stderr and code 1."""
    what, file = argv[0], Path(argv[1])
    if what == "rows":
        rows(file)
        return 0
    if what == "versions":
        print(json.dumps(versions()))
        return 0
    if what == "schema":
        print(json.dumps(schema(argv[2:]), indent=1, sort_keys=True))
        return 0
    task = json.loads(file.read_text())
    if what == "check":
        try:
            answer = check(task)
        except Exception as error:
            line = " ".join(str(error).split())
            print(f"evalscope refuses: {type(error).__name__}: {line}", file=sys.stderr)
            return 1
        for prompt in answer["prompts"]:
            text = json.dumps(prompt, sort_keys=True)
            answer.setdefault("hashes", []).append(hashlib.sha256(text.encode()).hexdigest()[:16])
        Path(argv[2]).write_text(json.dumps(answer))
        return 0
    from evalscope.config import TaskConfig
    from evalscope.run import run_task

    config = TaskConfig(**task)
    contain(task, config)
    run_task(config)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
