"""Make torch accept Megatron's CUDA calls on a machine without a GPU.

Megatron names the CUDA device literally in a hundred places. On a machine with no GPU, this maps each
of those to the CPU, in this process only. `torch.cuda.is_available()` stays False. A run that has a
GPU never comes here.
"""

from __future__ import annotations

import contextlib
import functools
import os
import types
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # before torch's functions are replaced: it indexes them
import torch.distributed as dist

_FACTORIES = (
    "tensor zeros ones empty full rand randn randint arange linspace zeros_like ones_like "
    "empty_like full_like rand_like randn_like as_tensor eye empty_strided"
).split()
_NEW = ("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")
_CPU = torch.device("cpu")
_enabled = False


def _to_cpu(device: Any) -> Any:
    """Map every spelling of a CUDA device to the CPU, and leave the rest alone."""
    if isinstance(device, int) and not isinstance(device, bool):
        return _CPU
    if isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda":
        return _CPU
    return device


def _with_cpu_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)  # pinning asks for a driver
        return function(*args, **kwargs)

    return wrapper


def _no_compile(model: Any = None, **options: Any) -> Any:
    return (lambda function: function) if model is None else model


class _Stream:
    """A stream or event of a device that has no queues: everything has already happened."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = record = wait = _nothing


def enable() -> None:
    """Apply the mapping once to this process."""
    global _enabled
    if _enabled:
        return
    _enabled = True
    # Compiling costs more than it gives here, and dynamo refuses the functions replaced below.
    torch.compile = _no_compile
    _patch_cuda_module()
    _patch_tensors()
    _patch_distributed()


def _patch_cuda_module() -> None:
    cuda = torch.cuda
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def zero(*args: Any, **kwargs: Any) -> int:
        return 0

    def seed(value: int) -> None:
        torch.default_generator.manual_seed(int(value))

    def get_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    # Validation asks which architecture it may use fused kernels for; none of them is reached.
    properties = types.SimpleNamespace(
        name="CPU", major=9, minor=0, total_memory=0, multi_processor_count=1
    )
    replaced: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "device_count": lambda: local_world,
        "get_device_properties": lambda *a, **k: properties,
        "get_device_capability": lambda *a, **k: (9, 0),
        "get_device_name": lambda *a, **k: "CPU",
        "memory_stats": lambda *a, **k: {},
        "mem_get_info": lambda *a, **k: (0, 0),
        "manual_seed": seed,
        "manual_seed_all": seed,
        "get_rng_state": get_state,
        "set_rng_state": set_state,
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda *a, **k: _Stream(),
        "default_stream": lambda *a, **k: _Stream(),
        "stream": lambda *a, **k: contextlib.nullcontext(),
        "device": lambda *a, **k: contextlib.nullcontext(),
    }
    for name in ("synchronize", "set_device", "empty_cache", "set_stream", "ipc_collect", "init"):
        replaced[name] = nothing
    for name in ("reset_peak_memory_stats", "reset_max_memory_allocated"):
        replaced[name] = nothing
    for name in ("memory_allocated", "max_memory_allocated"):
        replaced[name] = zero
    for name in ("memory_reserved", "max_memory_reserved", "utilization"):
        replaced[name] = zero
    for name, value in replaced.items():
        setattr(cuda, name, value)
    for module, names in (
        (cuda.random, ("manual_seed", "manual_seed_all", "get_rng_state", "set_rng_state")),
        (cuda.nvtx, ("range_push", "range_pop", "mark")),
    ):
        for name in names:
            setattr(module, name, replaced.get(name, nothing))


def _patch_tensors() -> None:
    for name in _FACTORIES:
        setattr(torch, name, _with_cpu_device(getattr(torch, name)))
    tensor: Any = torch.Tensor
    for name in _NEW:
        setattr(tensor, name, _with_cpu_device(getattr(tensor, name)))

    to, kind = tensor.to, tensor.type

    @functools.wraps(to)
    def cpu_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        return to(
            self, *(_to_cpu(a) if isinstance(a, (str, torch.device)) else a for a in args), **kwargs
        )

    @functools.wraps(kind)
    def cuda_type(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        # The optimizer compares type names with 'torch.cuda.BFloat16Tensor' and the like.
        if dtype is None:
            return kind(self).replace("torch.", "torch.cuda.", 1)
        return kind(self, dtype, **kwargs)

    tensor.to, tensor.type = cpu_to, cuda_type
    tensor.cuda = lambda self, *a, **k: self
    tensor.pin_memory = lambda self, *a, **k: self
    tensor.record_stream = lambda self, *a, **k: None
    torch.nn.Module.cuda = lambda self, *a, **k: self


def _patch_distributed() -> None:
    def gloo(backend: Any) -> Any:
        return "gloo" if isinstance(backend, str) and "nccl" in backend else backend

    def on_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("device_id", None)
            kwargs.pop("pg_options", None)
            if "backend" in kwargs:
                kwargs["backend"] = gloo(kwargs["backend"])
            return function(*(gloo(a) for a in args), **kwargs)

        return wrapper

    dist.init_process_group = on_gloo(dist.init_process_group)
    dist.new_group = on_gloo(dist.new_group)
    torch.distributed.distributed_c10d.new_group = dist.new_group
