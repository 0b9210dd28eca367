"""Shared by the tests of the fused functions: weights, the unfused layers, a GEMM that notes its operands."""

from __future__ import annotations

from kernel_cases import DEVICE, torch

from megatron_fp8_ext.fp8.emulation import EmulatedLinear
from megatron_fp8_ext.fused.gemm import ReferenceGemm
from megatron_fp8_ext.fused.linear import Linear, Setup
from megatron_fp8_ext.kernels.cast import cast_128x128

EPS = 1e-6


def random(*shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(shape, generator=generator))
    x = torch.randn(shape, generator=generator) * spread * scale
    return x.to(DEVICE, torch.bfloat16)


def parameter(*shape, scale=0.05, seed=0):
    return torch.nn.Parameter(random(*shape, scale=scale, seed=seed))


def linear(weight, scale_format, accumulate=True):
    return Linear(weight, cast_128x128(weight.detach(), scale_format), accumulate)


class Watching(ReferenceGemm):
    """Notes the operands it is given."""

    def __init__(self):
        self.seen = []

    def fprop(self, x, weight, bias=None, add=None):
        self.seen.append(("fprop", x.rows))
        return super().fprop(x, weight, bias, add)

    def dgrad(self, dy, weight):
        self.seen.append(("dgrad", dy.rows))
        return super().dgrad(dy, weight)

    def wgrad(self, x, dy, out, accumulate):
        self.seen.append(("wgrad", x.columns, dy.columns))
        return super().wgrad(x, dy, out, accumulate)


def setup(scale_format, parallel=None):
    return Setup(Watching(), scale_format, parallel)


def unfused_norm(x, gain):
    """FP32 inside, one rounding, as TransformerEngine's."""
    y = torch.nn.functional.rms_norm(x.float(), (x.shape[-1],), gain.float(), EPS)
    return y.to(torch.bfloat16)


def unfused_swiglu(a):
    gate, up = a.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(torch.bfloat16)


def unfused_linear(x, weight, bias, scale_format, column=False, group=None, sequence=False):
    """The emulated layer; `column` is column-parallel over `group`."""
    gathers = column and sequence
    return EmulatedLinear.apply(
        x, weight, bias, column and group is not None and not gathers, gathers, group, scale_format
    )


def unfused_mlp(x, gain, w1, w2, scale_format):
    a = unfused_linear(unfused_norm(x, gain), w1, None, scale_format)
    return unfused_linear(unfused_swiglu(a), w2, None, scale_format)


def sqnr(got, want):
    """Signal over error in dB."""
    got, want = got.double(), want.double()
    return float(
        10 * torch.log10(want.square().sum() / (got - want).square().sum().clamp_min(1e-300))
    )
