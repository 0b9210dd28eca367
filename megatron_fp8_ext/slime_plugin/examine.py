"""`megatron-fp8 doctor --slime`: what this environment lacks for slime.

Rows of (level, what, found, mend).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import compat
from megatron_fp8_ext.slime_plugin import checkout, preflight, sglang, weights

Row = tuple[Literal["ok", "note", "fail"], str, str, str]
OPEN = ("0.0.0.0", "::")


def examine(model: Path | None, engine_gpus: int, tp: int) -> list[Row]:
    """Look at slime, its packages, Ray's dashboard, the environment, and the served model if one is named.

    Args:
        model: folder of the served checkpoint.
        engine_gpus: `--rollout-num-gpus-per-engine`; 0 where no engine runs here (SFT, or engines elsewhere).
        tp: tensor parallel size of training.
    """
    slime, found = _slime()
    fits = sglang.of(found is None or found.per_step_batch)
    rows = [slime, _ray(), engine(compat.distribution_version("sglang"), fits), *_packages(fits)]
    rows += dashboards(_command_lines())
    rows += _tried("torch loading", lambda: preflight.refuse_unsafe_loading(os.environ), "safe")
    if model is not None:
        rows += _model(model, engine_gpus, tp)
    # SGLang's Python package is enough for slime itself.
    return [row for row in rows if engine_gpus or row[1] != "sgl_kernel"]


def _tried(what: str, check: object, good: str) -> list[Row]:
    try:
        assert callable(check)
        found = check()
    except UserError as error:
        return [("fail", what, str(error), "")]
    return [("note", what, found, "")] if found else [("ok", what, good, "")]


def _slime() -> tuple[Row, checkout.Checkout | None]:
    try:
        found = checkout.find()
    except UserError as error:
        return ("fail", "slime", str(error), ""), None
    line = "today's line (v0.3)" if found.per_step_batch else "the reference's line (8359c9a)"
    return ("ok", "slime", f"{found.root}, {line}", ""), found


def _ray() -> Row:
    version = compat.distribution_version("ray")
    if version is None:
        return ("fail", "ray", "not installed (slime runs on it)", "pip install ray")
    return ("ok", "ray", version, "")


def engine(version: str | None, fits: sglang.Versions) -> Row:
    """Return a row about the installed SGLang.

    Args:
        version: of the distribution; None without it.
        fits: the versions that the slime found here can use.
    """
    mend = f"pip install sglang=={fits.released_with}"
    if version is None:
        return ("fail", "sglang", "not installed (serves the rollouts)", mend)
    problem = fits.problem(version)
    if problem is not None:
        return ("fail", "sglang", f"{version}: {problem}", mend)
    same = version == fits.released_with
    note = "" if same else f" (this slime was released with {fits.released_with})"
    return ("ok", "sglang", f"{version}{note}", "")


def _packages(fits: sglang.Versions) -> list[Row]:
    rows: list[Row] = []
    if importlib.util.find_spec("sglang") and not importlib.util.find_spec("sgl_kernel"):
        mend = f"pip install sglang=={fits.released_with}"
        rows.append(("fail", "sgl_kernel", "not installed: SGLang cannot serve", mend))
    numpy = compat.distribution_version("numpy") or "0"
    if not numpy.startswith("1."):
        mend = 'pip install "numpy<2" (slime asserts it)'
        rows.append(("fail", "numpy", numpy, mend))
    return rows


def _command_lines() -> list[list[str]]:
    try:
        import psutil
    except ImportError:
        return []
    lines = []
    for process in psutil.process_iter(["cmdline"]):
        lines.append(list(process.info["cmdline"] or ()))
    return lines


def dashboards(command_lines: Iterable[list[str]]) -> list[Row]:
    """Return a row for each Ray dashboard of this machine.

    Whoever reaches a dashboard runs code on the cluster (CVE-2023-48022): it belongs on the loopback address.
    """
    rows: list[Row] = []
    for words in command_lines:
        if not any(word.endswith("ray/dashboard/dashboard.py") for word in words):
            continue
        host = next((w.partition("=")[2] for w in words if w.startswith("--host=")), "127.0.0.1")
        if host in OPEN:
            mend = "ray stop; ray start --head --dashboard-host=127.0.0.1"
            rows.append(("fail", "Ray dashboard", f"listens on {host}: anybody can run code", mend))
        else:
            rows.append(("ok", "Ray dashboard", f"listens on {host}", ""))
    return rows or [("ok", "Ray dashboard", "none runs here", "")]


def _model(model: Path, engine_gpus: int, tp: int) -> list[Row]:
    try:
        config: Mapping[str, object] = preflight.read_config(model)
    except UserError as error:
        return [("fail", "served model", str(error), "")]
    rows = _tried(
        "remote code", lambda: preflight.refuse_remote_code(model), "none in the checkpoint"
    )
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return [
            *rows,
            ("note", "served model", "BF16", "`megatron-fp8 convert hf-to-fp8` for FP8 rollouts"),
        ]
    fits = {"power_of_two": "infir2", "float32": "infir2-rl"}[
        preflight.served_scale_format(quantization)
    ]
    rows += _tried("quantization", lambda: weights.check_config(quantization), f"fits {fits}")
    if engine_gpus:
        rows += _tried(
            "engine TP",
            lambda: preflight.refuse_engine_tp(config, engine_gpus),
            f"{engine_gpus} splits whole blocks",
        )
    rows += _tried(
        "blocks", lambda: preflight.block_mismatch(config, tp), "training's are the served model's"
    )
    return rows
