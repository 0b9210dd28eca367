"""Which algorithm of cuBLASLt's is taken, and what happens where it refuses; its products need a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from megatron_fp8_ext.kernels import cublaslt, hopper_gemm  # noqa: E402
from megatron_fp8_ext.kernels.cast import (  # noqa: E402
    BlockCast,
    Operand,
    cast_1x128,
    cast_128x128,
)
from megatron_fp8_ext.megatron_plugin import te_gemm  # noqa: E402


@pytest.mark.parametrize(
    ("tiles", "place"),
    [  # as an H200's cuBLAS offers them for the weight gradients of QKV, the MLP, and alone
        ([208, 116, 20, 18, 17, 21, 19], 1),
        ([20, 21, 19, 208, 116, 18, 17], 0),
        ([208], 0),
        ([0, 208], 0),
    ],
)
def test_preferred(tiles, place):
    assert cublaslt.preferred(tiles) == place


def test_the_environment_leaves_it_to_te(monkeypatch):
    monkeypatch.setenv(cublaslt.VARIABLE, "te")
    cublaslt.reason.cache_clear()
    assert cublaslt.reason(0) == "MEGATRON_FP8_EXT_GEMM=te"
    cublaslt.reason.cache_clear()


def test_a_refused_product_is_te_s(monkeypatch):
    """And every later one: cuBLASLt is not asked again."""
    te_s, asked = torch.ones(128, 256), []
    te = SimpleNamespace(is_known=False, gemm=lambda *args, **kwargs: (te_s,))
    monkeypatch.setattr(te_gemm, "_te", lambda: te)
    monkeypatch.setattr(te_gemm, "_wrap", lambda cast: cast)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cublaslt, "reason", lambda device: None)

    def refuse(*args, **kwargs):
        asked.append(args)
        raise cublaslt.CublasError("cublasLtMatmulAlgoGetHeuristic: not supported (15)")

    monkeypatch.setattr(cublaslt, "matmul", refuse)
    monkeypatch.setattr(hopper_gemm, "is_for", lambda device: False)
    gemm = te_gemm.TEGemm()
    x = cast_1x128(torch.ones(128, 128, dtype=torch.bfloat16), "power_of_two")
    w = cast_128x128(torch.ones(256, 128, dtype=torch.bfloat16), "power_of_two")
    weight = SimpleNamespace(
        _rowwise_data=w.rows.codes,
        _rowwise_scale_inv=w.rows.scale_inv,
    )
    with pytest.warns(UserWarning, match="TransformerEngine makes the FP8 products: .*supported"):
        assert gemm.fprop(x, weight) is te_s
    assert gemm.wgrad(x, x, None, False) is te_s and len(asked) == 1
    # Who asks for cuBLASLt, as tests and benchmarks do, is not given another's product.
    with pytest.raises(cublaslt.CublasError, match="not supported"):
        te_gemm.TEGemm(direct=True).fprop(x, weight)


def test_who_multiplies(monkeypatch):
    """Our own kernel what it is the faster one for and fits; cuBLASLt the rest, or all of it."""
    made = []
    te = SimpleNamespace(is_known=False, gemm=None)
    monkeypatch.setattr(te_gemm, "_te", lambda: te)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cublaslt, "reason", lambda device: None)

    def product(name):
        def make(a, b, *args, **kwargs):
            out = next(a for a in args if isinstance(a, torch.Tensor))
            made.append((name, tuple(out.shape)))
            return out

        return make

    monkeypatch.setattr(cublaslt, "matmul", product("cuBLASLt"))
    monkeypatch.setattr(hopper_gemm, "matmul", product("own"))
    x = cast_1x128(torch.ones(128, 384, dtype=torch.bfloat16), "power_of_two")
    dy = cast_1x128(torch.ones(128, 256, dtype=torch.bfloat16), "power_of_two")
    w = cast_128x128(torch.ones(256, 384, dtype=torch.bfloat16), "power_of_two")
    weight = SimpleNamespace(
        _rowwise_data=w.rows.codes,
        _rowwise_scale_inv=w.rows.scale_inv,
        _columnwise_data=w.columns.codes,
        _columnwise_scale_inv=w.columns.scale_inv,
        update_usage=lambda **usage: None,
    )
    bias = torch.zeros(256, dtype=torch.bfloat16)

    main_grad = torch.zeros(256, 384)

    def all_products(gemm):
        made.clear()
        gemm.fprop(x, weight)
        gemm.dgrad(dy, weight)
        gemm.fprop(x, weight, bias)
        gemm.fprop(x, weight, add=torch.zeros(128, 256, dtype=torch.bfloat16))
        gemm.wgrad(x, dy, main_grad, True)
        gemm.wgrad(x, dy, None, False)
        assert [shape for _, shape in made] == [
            (128, 256),
            (128, 384),
            *[(128, 256)] * 2,
            *[(256, 384)] * 2,
        ]
        return [name for name, _ in made]

    monkeypatch.setattr(hopper_gemm, "reason", lambda device: None)
    monkeypatch.setattr(hopper_gemm, "suits", lambda k: True)
    assert all_products(te_gemm.TEGemm()) == ["own"] * 4 + ["cuBLASLt"] * 2
    monkeypatch.setattr(hopper_gemm, "suits", lambda k: k == 256)
    assert all_products(te_gemm.TEGemm()) == ["cuBLASLt", "own", *["cuBLASLt"] * 4]
    assert all_products(te_gemm.TEGemm(True, own=True)) == ["own"] * 4 + ["cuBLASLt"] * 2
    assert all_products(te_gemm.TEGemm(True)) == ["cuBLASLt"] * 6
    part = BlockCast(Operand(x.rows.codes[:64], x.rows.scale_inv), None)
    assert te_gemm.TEGemm().fprop(part, weight).shape == (64, 256) and made[-1][0] == "cuBLASLt"
    monkeypatch.setattr(hopper_gemm, "reason", lambda device: "it is wrong on this machine")
    with pytest.warns(UserWarning, match="cuBLASLt makes the FP8 products: it is wrong"):
        assert all_products(te_gemm.TEGemm()) == ["cuBLASLt"] * 6
    monkeypatch.setenv(cublaslt.VARIABLE, "cublaslt")
    assert all_products(te_gemm.TEGemm()) == ["cuBLASLt"] * 6
