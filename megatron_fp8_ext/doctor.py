"""`megatron-fp8 doctor`: what is here, what of it works together, and the mend for what does not."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_fp8_ext.megatron_plugin import compat
from megatron_fp8_ext.recipe import INFIR2, INFIR2_RL, TE_BACKWARD_OVERRIDE, TE_FP32_SCALES

Level = Literal["ok", "note", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: `fail` where training would fail, `note` where something is worth knowing.
        subject: what was looked at.
        found: what was found.
        mend: what to do; empty where nothing is to be done.
    """

    level: Level
    subject: str
    found: str
    mend: str = ""


def examine(gpus: int = 0) -> list[Finding]:
    """Look at this environment. Imports torch, Megatron and TransformerEngine if they are there.

    Args:
        gpus: GPUs that must be here; 0 where the CPU will do.
    """
    torch, finding = _import("torch", "pip install torch")
    findings = [_python(), finding]
    if torch is not None:
        findings += [_gpu(torch, gpus), *_kernels(torch)]
    findings += [_megatron(), _transformer_engine(torch)]
    findings += _optional() + _name_conflicts() + _environment()
    return findings


def _import(name: str, mend: str) -> tuple[Any, Finding]:
    if importlib.util.find_spec(name) is None:
        return None, Finding("fail", name, "not installed", mend)
    # Megatron's warnings of what is missing are this report's findings.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
    except Exception as error:  # a broken install fails in any way
        return None, Finding("fail", name, f"does not import: {error}", f"reinstall {name}")
    return module, Finding("ok", name, str(getattr(module, "__version__", "unknown version")))


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 12):
        return Finding(
            "note",
            "Python",
            version,
            "megatron-core 0.17 and later need 3.12; with this Python use a Megatron-LM checkout",
        )
    return Finding("ok", "Python", version)


def _gpu(torch: Any, needed: int) -> Finding:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < needed:
        mend = "look at nvidia-smi, the driver and CUDA_VISIBLE_DEVICES, or give fewer GPUs a node"
        return Finding("fail", "GPU", f"torch sees {count} of the {needed} this run needs", mend)
    if count == 0:
        return Finding(
            "note",
            "GPU",
            "none: the recipe would be emulated on the CPU (slow, same codes)",
            "train on a Hopper GPU for speed",
        )
    capability = tuple(torch.cuda.get_device_capability())
    cuda = compat.parse_version(torch.version.cuda) if torch.version.cuda else None
    gap = compat.fp8_gap("999", (capability[0], capability[1]), cuda)
    name = f"{count} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    if gap is None:
        return Finding("ok", "GPU", name)
    what, _, mend = gap.partition("; ")
    return Finding("fail", "GPU", f"{name}: {what}", mend)


def _kernels(torch: Any) -> list[Finding]:
    """Whether the fused layers' kernels compile on this GPU; nothing where there is none."""
    if not torch.cuda.is_available():
        return []
    from megatron_fp8_ext.kernels import hopper, support

    gap = support.gap(torch.device("cuda", 0))
    if gap is not None:
        mend = "layers keep TransformerEngine's path; fused ones need Triton and Hopper"
        return [Finding("note", "fused kernels", gap, mend)]
    reason = hopper.reason(0)
    if reason is not None:
        mend = "they run in Triton, slower; torch's CUDA packages bring NVRTC"
        return [Finding("note", "fused kernels", reason, mend)]
    return [Finding("ok", "fused kernels", "CUDA, compiled at run time")]


def _megatron() -> Finding:
    wheel = compat.distribution_version("megatron-core")
    install = 'pip install "megatron-core>=0.17,<0.20" psutil, or put a Megatron-LM checkout on PYTHONPATH'
    if importlib.util.find_spec("megatron") is None:
        return Finding("fail", "Megatron", "not installed", install)
    if importlib.util.find_spec("megatron.training") is None:
        return Finding(
            "fail", "Megatron", f"megatron-core {wheel} without megatron.training", install
        )
    _, imported = _import("megatron.core", "reinstall megatron-core")
    if imported.level == "fail":
        return imported
    version = compat.megatron_version()
    tested = compat.parse_version(version)[:2] in compat.MEGATRON_TESTED
    where = "wheel" if compat.megatron_is_wheel() else "checkout"
    if tested:
        return Finding("ok", "Megatron", f"{version} ({where})")
    return Finding(
        "note",
        "Megatron",
        f"{version} ({where}), not among the tested versions",
        "tested: " + ", ".join(".".join(map(str, v)) for v in compat.MEGATRON_TESTED),
    )


def _transformer_engine(torch: Any) -> Finding:
    on_gpu = torch is not None and torch.cuda.is_available()
    if not on_gpu:
        found = compat.distribution_version("transformer-engine") or "not installed"
        return Finding("ok", "TransformerEngine", f"{found} (not used without a GPU)")
    _, finding = _import(
        "transformer_engine",
        'pip install --no-build-isolation "transformer_engine[pytorch]>=2.4"',
    )
    if finding.level == "ok" and compat.parse_version(finding.found) < compat.MIN_TE:
        return Finding(
            "fail",
            "TransformerEngine",
            f"{finding.found} has no block scaling",
            "update it to 2.4 or later",
        )
    return Finding(finding.level, "TransformerEngine", finding.found, finding.mend)


def _optional() -> list[Finding]:
    rows = []
    for name, use in (
        ("flash-attn", "faster attention for packed sequences"),
        ("psutil", "Megatron needs it to save torch_dist checkpoints"),
    ):
        version = compat.distribution_version(name)
        if version is not None:
            rows.append(Finding("ok", name, version))
        else:
            rows.append(Finding("note", name, f"not installed ({use})", f"pip install {name}"))
    return rows


def package_folder(name: str) -> Path | None:
    """Return the folder of a top-level package without importing it, or None."""
    spec = importlib.util.find_spec(name)
    # Without an __init__.py it is a folder of that name in the working directory: a checkout, say.
    if spec is None or spec.origin is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _name_conflicts() -> list[Finding]:
    """Two packages on PyPI carry the names of tools they have nothing to do with."""
    rows = []
    slime = package_folder("slime")
    if slime is None and compat.distribution_version("slime") is None:
        rows.append(Finding("ok", "slime", "not installed (needed for RL only)"))
    elif slime is None or not (slime / "backends").is_dir():
        rows.append(
            Finding(
                "fail",
                "slime",
                "PyPI's `slime`, an unrelated statistics package",
                "pip uninstall slime, then pip install git+https://github.com/THUDM/slime",
            )
        )
    else:
        rows.append(Finding("ok", "slime", compat.distribution_version("slime") or "checkout"))
    apex = package_folder("apex")
    if apex is None:
        rows.append(
            Finding("note", "apex", "not installed", "add --no-gradient-accumulation-fusion")
        )
    elif not (apex / "optimizers").is_dir():
        rows.append(
            Finding(
                "fail",
                "apex",
                "PyPI's `apex`, an unrelated web toolkit",
                "pip uninstall apex (and build NVIDIA's from github.com/NVIDIA/apex if wanted)",
            )
        )
    else:
        rows.append(Finding("ok", "apex", "NVIDIA's"))
    return rows


def _environment() -> list[Finding]:
    rows = []
    scales = os.environ.get(TE_FP32_SCALES)
    if scales is None:
        rows.append(Finding("ok", TE_FP32_SCALES, "unset; each run sets it for its recipe"))
    else:
        fits = INFIR2_RL if scales == "1" else INFIR2
        refused = INFIR2 if scales == "1" else INFIR2_RL
        rows.append(
            Finding(
                "fail",
                TE_FP32_SCALES,
                f"{scales}: only {fits.name} could run, {refused.name} would be refused",
                "unset it; each run sets it for its recipe",
            )
        )
    override = os.environ.get(TE_BACKWARD_OVERRIDE, "")
    if override.lower() not in ("", "none"):
        rows.append(
            Finding(
                "fail",
                TE_BACKWARD_OVERRIDE,
                f"{override}: the backward would not be FP8, so runs are refused",
                "unset it",
            )
        )
    if os.environ.get("MEGATRON_FP8_EXT") == "0":
        rows.append(
            Finding(
                "note",
                "MEGATRON_FP8_EXT",
                "0: the autoload door is shut, an unmodified "
                "pretrain_gpt.py will not know our recipes",
                "unset it",
            )
        )
    return rows
