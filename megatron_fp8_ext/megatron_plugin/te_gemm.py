"""The block-scaled GEMM under the fused functions, and TransformerEngine's FP8 weights as their operands.

A kernel of our own (`kernels.hopper_gemm`) multiplies where it is the faster one, otherwise cuBLASLt
(`kernels.cublaslt`); TransformerEngine does where neither can be called. All give the same bits.

Written against TransformerEngine 2.20 (`pytorch/module/layernorm_linear.py`, `module/base.py`): the calls and
their order are those of its own modules.
"""

from __future__ import annotations

import functools
import warnings
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_fp8_ext.kernels import cublaslt, hopper_gemm
from megatron_fp8_ext.kernels.cast import BlockCast, Operand
from megatron_fp8_ext.megatron_plugin.te_tensor import binding


@functools.cache
def _te() -> Any:
    """What is used of TransformerEngine, looked up once: this runs for every GEMM."""
    tex = binding()
    from transformer_engine.pytorch.cpp_extensions import general_gemm
    from transformer_engine.pytorch.module.base import quantize_weight
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
        Float8BlockwiseQTensorStorage,
    )

    try:
        from transformer_engine.pytorch.constants import TE_DType
        from transformer_engine.pytorch.cpp_extensions.gemm import get_cublas_workspace
    except ImportError:
        TE_DType, get_cublas_workspace = None, None
    try:
        known = version("transformer-engine").startswith("2.20.")
    except PackageNotFoundError:
        known = False
    return SimpleNamespace(
        tex=tex,
        dtypes=TE_DType,
        workspace=get_cublas_workspace,
        is_known=known and get_cublas_workspace is not None,
        e4m3=tex.DType.kFloat8E4M3,
        gemm=general_gemm,
        quantize_weight=quantize_weight,
        Quantized=QuantizedTensorStorage,
        Blockwise=Float8BlockwiseQTensorStorage,
    )


def _wrap(cast: BlockCast) -> Any:
    """A cast as TransformerEngine's light tensor, without a copy; its GEMM reads no quantizer."""
    rows, columns = cast.rows or (None, None), cast.columns or (None, None)
    te = _te()
    return te.Blockwise(
        rowwise_data=rows[0],
        rowwise_scale_inv=rows[1],
        columnwise_data=columns[0],
        columnwise_scale_inv=columns[1],
        fp8_dtype=te.e4m3,
        quantizer=None,
        is_2D_scaled=cast.square,
        fake_dtype=torch.bfloat16,
    )


def _without_python(
    a: Any,
    b: Any,
    layout: str = "TN",
    grad: bool = False,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
    accumulate: bool = False,
    use_split_accumulator: bool = True,
) -> tuple[Tensor | None, ...]:
    """`general_gemm` of TransformerEngine 2.20 without its checks, twelve times a layer."""
    te = _te()
    workspace = te.workspace(torch.cuda.current_device(), False, False)
    made: tuple[Tensor | None, ...] = te.tex.generic_gemm(
        a,
        layout[0] == "T",
        b,
        layout[1] == "T",
        out,
        None,
        te.dtypes[out_dtype],
        bias,
        te.dtypes[torch.bfloat16 if bias is None else bias.dtype],
        False,
        None,
        grad,
        workspace,
        workspace.shape[0],
        accumulate,
        use_split_accumulator,
        comm_overlap=None,
        comm_type=None,
        extra_output=None,
        bulk_overlap=False,
        alpha=1.0,
        beta=1.0 if accumulate else 0.0,
    )
    return made


class TEGemm:
    """The protocol of `fused.gemm`; the weight is TransformerEngine's FP8 tensor."""

    def __init__(self, direct: bool | None = None, own: bool = False) -> None:
        """Choose who multiplies.

        Args:
            direct: call cuBLASLt here, and no kernel of ours; None for whoever is the fastest, and
                TransformerEngine where cuBLASLt refuses.
            own: make x W^T and dy W by our own kernel wherever it fits.

        Raises:
            CublasError: cuBLASLt is asked for and cannot be called; a product of it then raises one too.
        """
        te, device = _te(), torch.cuda.current_device()
        self._gemm = _without_python if te.is_known else te.gemm
        gap = None if direct is False else cublaslt.reason(device)
        if direct and gap is not None:
            raise cublaslt.CublasError(f"cuBLASLt cannot be called here: {gap}")
        self._direct, self._asked = direct is not False and gap is None, bool(direct)
        self._own = own
        self._may_own = self._direct and direct is None and hopper_gemm.is_for(device)

    def _by_cublaslt(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """`cublaslt.matmul`; None, now and ever after, where cuBLASLt refuses a product."""
        try:
            return cublaslt.matmul(*args, **kwargs)
        except cublaslt.CublasError as error:
            if self._asked:
                raise
            self._direct = False
            warnings.warn(f"TransformerEngine makes the FP8 products: {error}", stacklevel=2)
            return None

    def _product(
        self, x: Operand, w: Operand, bias: Tensor | None = None, add: Tensor | None = None
    ) -> Tensor | None:
        """x w^T (+ bias, + add) by our own kernel where it is to be and fits; else as `_by_cublaslt`."""
        out = _empty(x, w)
        own = self._own or (self._may_own and hopper_gemm.suits(x.codes.shape[1]))
        if own and hopper_gemm.unfit(x, w, out, bias, add) is None:
            return hopper_gemm.matmul(x, w, out, bias, add)
        return self._by_cublaslt(w, x, True, out, bias=bias, add=add)

    def fprop(
        self, x: BlockCast, weight: Any, bias: Tensor | None = None, add: Tensor | None = None
    ) -> Tensor:
        """x W^T + b (+ `add`), `[M, N]` BF16."""
        if self._direct and x.rows is not None and (bias is None or bias.dtype is torch.bfloat16):
            w = Operand(weight._rowwise_data, weight._rowwise_scale_inv)
            made = self._product(x.rows, w, bias, add)
            if made is not None:
                return made
        y: Tensor = self._gemm(
            weight, _wrap(x), out_dtype=torch.bfloat16, bias=bias, use_split_accumulator=True
        )[0]
        return y if add is None else y.add_(add)

    def dgrad(self, dy: BlockCast, weight: Any) -> Tensor:
        """dy W, `[M, K]` BF16."""
        weight.update_usage(columnwise_usage=True)
        if self._direct and dy.rows is not None:
            w = Operand(weight._columnwise_data, weight._columnwise_scale_inv)
            made = self._product(dy.rows, w)
            if made is not None:
                return made
        dx: Tensor = self._gemm(
            weight,
            _wrap(dy),
            layout="NN",
            grad=True,
            out_dtype=torch.bfloat16,
            use_split_accumulator=True,
        )[0]
        return dx

    def wgrad(self, x: BlockCast, dy: BlockCast, out: Tensor | None, accumulate: bool) -> Tensor:
        """dy^T x, `[N, K]`, into `out` (its dtype; added to it, if `accumulate`) or as new BF16."""
        if self._direct and x.columns is not None and dy.columns is not None:
            into = _empty(dy.columns, x.columns) if out is None else out
            made = self._by_cublaslt(x.columns, dy.columns, False, into, accumulate)
            if made is not None:
                return made
        dw: Tensor = self._gemm(
            _wrap(x._replace(rows=None)),
            _wrap(dy),
            layout="NT",
            grad=True,
            out=out,
            out_dtype=torch.bfloat16 if out is None else out.dtype,
            accumulate=accumulate,
            use_split_accumulator=True,
        )[0]
        return dw


def _empty(rows: Operand, columns: Operand) -> Tensor:
    size = (rows.codes.shape[0], columns.codes.shape[0])
    return torch.empty(size, dtype=torch.bfloat16, device=rows.codes.device)


def weight_operand(module: Any, first_microbatch: bool | None) -> Any:
    """Return the FP8 weight of a TransformerEngine linear layer as its own forward would.

    A weight that is kept in FP8 is itself the operand; another one is cast, once a step where Megatron tells
    the first micro-batch, and kept in the module as TransformerEngine keeps it.

    Args:
        module: a `Linear` or `LayerNormLinear` inside its `prepare_forward`.
        first_microbatch: None where the cast is not to be kept.
    """
    te, weight = _te(), module.weight
    quantized = isinstance(weight, te.Quantized)
    (quantizer,) = module._get_weight_quantizers()
    quantizer.optimize_for_gemm = module._enable_weight_preswizzle(quantizer, weight)
    if quantized:
        quantizer = weight._quantizer
    else:
        quantizer.set_usage(rowwise=True, columnwise=torch.is_grad_enabled())
    keep = first_microbatch is not None
    operand, made = te.quantize_weight(
        # Not the parameter's graph: the cast has no gradient.
        tensor=weight if quantized else weight.detach(),
        quantizer=quantizer,
        workspace=module._fp8_workspaces.get("weight") if keep else None,
        update_workspace=first_microbatch is None or first_microbatch,
        workspace_dtype=torch.bfloat16,
        cache=keep,
    )
    operand.update_usage(rowwise_usage=True)
    if made is not None and keep:
        module._fp8_workspaces["weight"] = made.detach() if isinstance(made, Tensor) else made
    return operand
