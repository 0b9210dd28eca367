"""Runs inside evalscope's environment, as a file: `python -I runner.py check|run|rows FILE`.

It imports evalscope and nothing of ours. The address and key of the server come in the environment
(EVALSCOPE_BASE_URL, EVALSCOPE_API_KEY), so that a restart on another port changes neither evalscope's
cache identity nor any file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import sys
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
    if unknown:
        raise ValueError(f"evalscope does not know {', '.join(unknown)}")
    config = TaskConfig(**task)
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

    run_task(TaskConfig(**task))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
