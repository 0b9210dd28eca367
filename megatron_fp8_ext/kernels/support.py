"""Whether the kernels can run here, and the reason where they cannot."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

# e4m3 conversions need Ada or later; Triton emits Hopper's instruction for them.
MIN_FP8_CAPABILITY = (8, 9)


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_hopper(device: int) -> bool:
    """Whether CUDA code for sm_90a runs on this device."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU; 1 for a CPU."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def gap(device: torch.device, fp8: bool = True) -> str | None:
    """Say why the kernels cannot run on `device`, in one clause; None if they can.

    Args:
        device: where the tensors are.
        fp8: whether the kernel writes E4M3.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, and Triton compiles for a GPU"
    capability = torch.cuda.get_device_capability(device)
    if fp8 and capability < MIN_FP8_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and E4M3 needs 8.9"
    return None
