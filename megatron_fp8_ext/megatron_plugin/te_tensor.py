"""Our casts as TransformerEngine's tensors: the same memory, so its GEMMs take them."""

from __future__ import annotations

from typing import Any

import torch

from megatron_fp8_ext.kernels.cast import BlockCast
from megatron_fp8_ext.recipe import ScaleFormat


def binding() -> Any:
    """TransformerEngine's C++ binding; its package loads the library that it links to."""
    import transformer_engine.pytorch  # noqa: F401
    import transformer_engine_torch

    return transformer_engine_torch


def quantizer(scale_format: ScaleFormat, square: bool) -> Any:
    """Return TransformerEngine's quantizer of the recipe: E4M3, 1x128 or 128x128 blocks."""
    tex = binding()
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    return Float8BlockQuantizer(
        fp8_dtype=tex.DType.kFloat8E4M3,
        rowwise=True,
        columnwise=True,
        force_pow_2_scales=scale_format == "power_of_two",
        block_scaling_dim=2 if square else 1,
    )


def blockwise(cast: BlockCast, scale_format: ScaleFormat, dtype: torch.dtype) -> Any:
    """Wrap a cast as a `Float8BlockwiseQTensor` of nominal `dtype`, without a copy."""
    tex = binding()
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor

    rows, columns = cast.rows, cast.columns
    if rows is not None:
        shape = tuple(rows.codes.shape)
    else:
        assert columns is not None
        shape = tuple(reversed(columns.codes.shape))
    return Float8BlockwiseQTensor(
        shape=shape,
        dtype=dtype,
        rowwise_data=None if rows is None else rows.codes,
        rowwise_scale_inv=None if rows is None else rows.scale_inv,
        columnwise_data=None if columns is None else columns.codes,
        columnwise_scale_inv=None if columns is None else columns.scale_inv,
        fp8_dtype=tex.DType.kFloat8E4M3,
        quantizer=quantizer(scale_format, cast.square),
        is_2D_scaled=cast.square,
        requires_grad=False,
    )


def gemm(weight: Any, x: Any, layout: str = "TN", out_dtype: torch.dtype = torch.bfloat16) -> Any:
    """TransformerEngine's block-scaled GEMM, as its linear layer calls it for fprop (`TN`)."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    return general_gemm(
        weight,
        x,
        out_dtype=out_dtype,
        layout=layout,
        use_split_accumulator=True,
        grad=layout == "NT",
    )[0]


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """TransformerEngine's SwiGLU of `[M, 2F]`, not cast."""
    y: torch.Tensor = binding().swiglu(x, None)
    return y


def swiglu_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """TransformerEngine's gradient of SwiGLU's input, not cast."""
    dx: torch.Tensor = binding().dswiglu(dy, x, None)
    return dx
