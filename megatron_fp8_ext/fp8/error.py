"""How far a quantized tensor or a layer's output is from the original."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise in dB, `10 log10(sum r^2 / sum (r - a)^2)`; inf where equal."""
    return decibels(*energies(reference, approximation))


def energies(reference: Tensor, approximation: Tensor) -> tuple[float, float]:
    """Return `sum r^2` and `sum (r - a)^2` in FP64, to be added up over the parts of a tensor."""
    r = reference.to(torch.float64)
    noise = (r - approximation.to(torch.float64)).square().sum().item()
    return r.square().sum().item(), noise


def decibels(signal: float, noise: float) -> float:
    """Return the ratio of two energies in dB; inf without noise, -inf where either is not finite."""
    if noise == 0:
        return math.inf
    if not signal or not math.isfinite(signal) or not math.isfinite(noise):
        return -math.inf
    return 10 * math.log10(signal / noise)
