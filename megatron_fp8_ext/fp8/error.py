"""How far a quantized tensor or a layer's output is from the original."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise in dB, `10 log10(sum r^2 / sum (r - a)^2)`; inf where equal."""
    r = reference.to(torch.float64)
    noise = (r - approximation.to(torch.float64)).square().sum().item()
    if noise == 0:
        return math.inf
    signal = r.square().sum().item()
    return 10 * math.log10(signal / noise) if signal else -math.inf
