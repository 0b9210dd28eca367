"""The three products of a linear layer on cast operands, as a protocol, and its reference in FP32."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_fp8_ext.kernels.cast import BlockCast

# Whatever a backend multiplies with: TransformerEngine's tensor, or for the reference a `BlockCast`.
Weight = Any


class Gemm(Protocol):
    """Products with FP32 accumulation; M tokens, N output and K input features.

    `weight` is `[N, K]` with both of its uses; `x` and `dy` have the direction that is read.
    """

    def fprop(
        self, x: BlockCast, weight: Weight, bias: Tensor | None = None, add: Tensor | None = None
    ) -> Tensor:
        """Return x W^T + b (+ `add`, `[M, N]` BF16), `[M, N]` BF16; reads the rows of `x` `[M, K]`."""
        ...

    def dgrad(self, dy: BlockCast, weight: Weight) -> Tensor:
        """Return dy W, `[M, K]` BF16; reads the rows of `dy` `[M, N]`."""
        ...

    def wgrad(self, x: BlockCast, dy: BlockCast, out: Tensor | None, accumulate: bool) -> Tensor:
        """Return dy^T x, `[N, K]`; reads the columns of both.

        Args:
            x: `[M, K]`.
            dy: `[M, N]`.
            out: written in its own dtype, or added to; None for a new BF16 tensor.
            accumulate: whether to add to `out`.
        """
        ...


class ReferenceGemm:
    """Dequantize and multiply in FP32, on any device; the weight is a 128x128 `BlockCast`."""

    def fprop(
        self, x: BlockCast, weight: BlockCast, bias: Tensor | None = None, add: Tensor | None = None
    ) -> Tensor:
        """As the protocol says."""
        y = x.quantized().dequantize() @ weight.quantized().dequantize().t()
        for term in (bias, add):
            y = y if term is None else y + term.float()
        return y.to(torch.bfloat16)

    def dgrad(self, dy: BlockCast, weight: BlockCast) -> Tensor:
        """As the protocol says."""
        w_KN = weight.quantized(columns=True).dequantize()
        return (dy.quantized().dequantize() @ w_KN.t()).to(torch.bfloat16)

    def wgrad(self, x: BlockCast, dy: BlockCast, out: Tensor | None, accumulate: bool) -> Tensor:
        """As the protocol says."""
        x_KM = x.quantized(columns=True).dequantize()
        dw = dy.quantized(columns=True).dequantize() @ x_KM.t()
        if out is None:
            return dw.to(torch.bfloat16)
        return out.add_(dw) if accumulate else out.copy_(dw)
