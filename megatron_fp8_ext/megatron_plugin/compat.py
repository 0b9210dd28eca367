"""Versions and devices: the only file that knows which Megatron, TransformerEngine and GPU do what.

Supported: Megatron-LM core_v0.14 with TransformerEngine 2.4 (the reference's line) and megatron-core 0.17
to 0.19 with TransformerEngine 2.20 (today's). Everything else is tried and said to be untested.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

# Hopper; TransformerEngine's block-scaled GEMM needs it, and cuBLAS of CUDA 12.9.
MIN_CAPABILITY = (9, 0)
MIN_CUDA = (12, 9)
MIN_TE = (2, 3)
MEGATRON_TESTED = ((0, 14), (0, 17), (0, 18), (0, 19))

PretrainShape = Literal["providers", "container_and_provider", "container"]


def parse_version(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: `2.20.2+abc` -> (2, 20, 2)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def megatron_version() -> str:
    """Return the version of the Megatron that this process imports, a checkout included.

    From 0.19 on Megatron appends the commit of whatever git repository its files lie in: for a wheel
    that is the user's own project, so it is left out there.
    """
    try:
        version = str(importlib.import_module("megatron.core.package_info").__version__)
    except (ImportError, AttributeError):
        return distribution_version("megatron-core") or "unknown"
    return version.partition("+")[0] if megatron_is_wheel() else version


def megatron_is_wheel() -> bool:
    """Whether the Megatron that this process imports is the installed distribution."""
    spec = importlib.util.find_spec("megatron.core")
    try:
        installed = metadata.distribution("megatron-core").locate_file("megatron/core/__init__.py")
    except metadata.PackageNotFoundError:
        return False
    if spec is None or spec.origin is None:
        return False
    return Path(spec.origin).resolve() == Path(str(installed)).resolve()


def distribution_version(name: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def source_digest() -> str:
    """Return a short digest of this package's source: a version alone does not tell two checkouts apart."""
    import megatron_fp8_ext

    root = Path(megatron_fp8_ext.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".cu", ".cuh")):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def versions() -> dict[str, str]:
    """Return what a run's numbers depend on: versions of the stack, our own source, and the device."""
    import torch

    import megatron_fp8_ext

    return {
        "megatron_fp8_ext": f"{megatron_fp8_ext.__version__} (source {source_digest()})",
        "megatron": megatron_version(),
        "torch": str(torch.__version__),
        "transformer_engine": (
            distribution_version("transformer-engine") if torch.cuda.is_available() else None
        )
        or "none",
        "device": device_name(),
    }


def device_name() -> str:
    """Return the name of the GPU, or `CPU`."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def fp8_gap(
    transformer_engine: str | None,
    capability: tuple[int, int] | None,
    cuda: tuple[int, ...] | None,
) -> str | None:
    """Say why block-scaled FP8 GEMMs cannot run, in one clause with its mend; None if they can.

    Args:
        transformer_engine: its version, or None if it is not installed or does not import.
        capability: compute capability of the GPU, or None without one.
        cuda: CUDA version torch was built with.
    """
    if capability is None:
        return "there is no GPU"
    if capability < MIN_CAPABILITY:
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}, and block-scaled FP8 "
            "needs 9.0 (Hopper) or later; use --fp8-recipe bf16 on this GPU"
        )
    if cuda is None or cuda[:2] < MIN_CUDA:
        shown = ".".join(map(str, cuda)) if cuda else "none"
        return f"torch is built for CUDA {shown}, and block scaling needs 12.9; update torch"
    if transformer_engine is None:
        return (
            "TransformerEngine is not installed; "
            'pip install --no-build-isolation "transformer_engine[pytorch]>=2.4"'
        )
    if parse_version(transformer_engine) < MIN_TE:
        return f"TransformerEngine {transformer_engine} has no block scaling; update it to 2.4 or later"
    return None


def process_fp8_gap() -> tuple[bool, str | None]:
    """Return (whether torch sees a GPU, the FP8 gap of this process), with Megatron imported."""
    import torch

    if not torch.cuda.is_available():
        return False, fp8_gap(None, None, None)
    cuda = parse_version(torch.version.cuda) if torch.version.cuda else None
    return True, fp8_gap(_imported_te_version(), torch.cuda.get_device_capability(), cuda)


def _imported_te_version() -> str | None:
    """Version of the TransformerEngine that Megatron uses; None if Megatron could not import it."""
    core = importlib.import_module("megatron.core.fp8_utils")
    if not getattr(core, "HAVE_TE", False):
        return None
    engine = importlib.import_module("transformer_engine")
    version = getattr(engine, "__version__", None) or distribution_version("transformer-engine")
    return str(version) if version else None


def pretrain_shape(pretrain: Callable[..., Any]) -> PretrainShape:
    """Tell Megatron's three `pretrain()` protocols apart by signature.

    `providers`: up to 0.17, `(datasets, model_provider, model_type, forward_step, ...)`.
    `container_and_provider`: 0.18, `(cfg_container, datasets, model_provider, ...)`.
    `container`: from 0.19, `(cfg_container, datasets, model_type, forward_step, ...)`.
    """
    names = list(inspect.signature(pretrain).parameters)
    if "cfg_container" not in names:
        return "providers"
    return "container_and_provider" if names[2] == "model_provider" else "container"


def slice_for_context_parallel(batch: dict[str, Any]) -> dict[str, Any]:
    """Return this context-parallel rank's part of a batch of whole sequences.

    Megatron's own zigzag slicing, whose signature grew between 0.17 and 0.19.
    """
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    if parallel_state.get_context_parallel_world_size() == 1:
        return batch
    kept = {name: tensor for name, tensor in batch.items() if tensor is not None}
    if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters:
        group = parallel_state.get_context_parallel_group()
        sliced = get_batch_on_this_cp_rank(kept, is_hybrid_cp=False, cp_group=group)
    else:
        sliced = get_batch_on_this_cp_rank(kept)
    return {**batch, **sliced}


def layer_stays_bf16(config: Any, layer_no: int) -> bool:
    """Whether `--first-last-layers-bf16` takes this layer out of FP8.

    Megatron has `fp8_utils.is_first_last_bf16_layer` for it, but not in core_v0.14.

    Args:
        config: Megatron's TransformerConfig.
        layer_no: index over all pipeline stages, from 0; negative asks for no layer in particular.
    """
    if layer_no < 0 or not config.first_last_layers_bf16:
        return False
    last = config.num_layers - config.num_layers_at_end_in_bf16
    return bool(layer_no < config.num_layers_at_start_in_bf16 or layer_no >= last)
