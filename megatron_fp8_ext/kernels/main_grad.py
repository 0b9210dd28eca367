"""Megatron's gradient buffers: where a gradient is added in the backward, without a copy of it."""

from __future__ import annotations

import torch
from torch import Tensor


def of(weight: Tensor) -> Tensor | None:
    """The buffer, where Megatron's data parallelism keeps one and knows that we may add to it."""
    if not hasattr(weight, "grad_added_to_main_grad") or hasattr(weight, "__fsdp_param__"):
        return None
    buffer: Tensor | None = getattr(weight, "main_grad", None)
    return buffer


def of_vector(parameter: Tensor) -> Tensor | None:
    """The same for a norm's gain or a bias, whose gradient is only ever added to the buffer."""
    if getattr(parameter, "overwrite_main_grad", False):
        return None
    return of(parameter)


def put(total: Tensor, dtype: torch.dtype, buffer: Tensor | None) -> Tensor:
    """Add `total` to `buffer` and return that; without one return it in `dtype`."""
    return total.to(dtype) if buffer is None else buffer.add_(total)


def dummy(weight: Tensor) -> Tensor:
    """Tell Megatron that `main_grad` has the gradient, and return what its hooks want to see.

    A weight shared with the embedding says `zero_out_wgrad`: autograd adds the embedding's gradient to
    what we return, and Megatron adds that sum to `main_grad`.
    """
    weight.grad_added_to_main_grad = True
    make = torch.zeros if getattr(weight, "zero_out_wgrad", False) else torch.empty
    # Not `empty_like`: the weight may be a tensor subclass that holds FP8.
    return make(weight.shape, dtype=weight.dtype, device=weight.device)
