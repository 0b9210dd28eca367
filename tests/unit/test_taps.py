"""What the numerics taps say of operands that were cast together is what each alone would give."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from megatron_fp8_ext.fp8 import casts, statistics  # noqa: E402
from megatron_fp8_ext.megatron_plugin import taps  # noqa: E402


@pytest.mark.parametrize(("together", "waiting"), [(1, 1), (1 << 17, 1 << 18), (1 << 30, 1 << 30)])
def test_each_operand_has_its_own_error(together, waiting, monkeypatch):
    monkeypatch.setattr(taps, "TOGETHER", together)
    monkeypatch.setattr(taps, "WAITING", waiting)
    torch.manual_seed(0)
    seen = taps.Taps(casts.INFIR2_CASTS)
    want = {}
    for layer in range(1, 6):
        for linear, width in (("linear_qkv", 256), ("linear_fc1", 384)):
            x = torch.randn(2 * taps.ROWS, width).mul(10.0**layer).bfloat16()
            first = x[: taps.ROWS]
            w = torch.randn(width, 128).bfloat16()
            for operand, values, cast_of in (
                ("input rows", x, first),
                ("input columns", x, first.t().contiguous()),
                ("weight", w, w),
                ("grad rows", -x, -first),
            ):
                kind = "weight" if operand == "weight" else "input"
                seen.observe(layer, linear, operand, values)
                cast = getattr(casts.INFIR2_CASTS, kind)
                error = statistics.cast_error(cast_of, cast, casts.INFIR2_CASTS.scale_format)
                want[layer, linear, operand] = vars(error)
            seen.observe(layer, linear, "weight", w * 0)  # only the first one counts
    for row in seen.record(7)["layers"]:
        key = row["layer"], row["linear"], row["operand"]
        for name, value in want.pop(key).items():
            assert row[name] == pytest.approx(value, rel=1e-6), (key, name)
    assert not want
