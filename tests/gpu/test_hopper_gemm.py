"""Our own block-scaled GEMM on a Hopper GPU: cuBLASLt's bits, and again.

pytest tests/gpu/test_hopper_gemm.py -x -v      the small ones first; after a fault the process is of no use
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from megatron_fp8_ext.kernels import cublaslt, hopper_gemm  # noqa: E402
from megatron_fp8_ext.kernels.cast import cast_1x128, cast_128x128  # noqa: E402

pytestmark = pytest.mark.gpu
CLUSTERS = pytest.mark.parametrize("cluster", [1, 2])  # the simplest first
# M, N, K: one tile, odd numbers of tiles, fewer and more blocks of K than stages, more tiles than processors.
SMALL = (
    (128, 128, 128),
    (256, 256, 256),
    (384, 640, 384),
    (128, 1152, 2048),
    (1408, 384, 896),
    (4096, 4224, 640),
)
LAYERS = {  # N, K of fprop: QKV, projection, fc1, fc2; dgrad has them the other way round
    "qwen2.5-1.5b": ((2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960)),
    "qwen2.5-7b": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
}
PRODUCTS = {
    f"{model} {m}x{n}x{k} {way}": (m, *((n, k) if way == "fprop" else (k, n)))
    for model, layers in LAYERS.items()
    for m in (1152, 8192, 16384 if model.endswith("1.5b") else 4096)
    for n, k in layers
    for way in ("fprop", "dgrad")
}


def operands(m, n, k, scale_format):
    """Blocks of different size; the weight is a transposed cast, as in dgrad, if N / 128 is odd."""
    generator = torch.Generator("cuda").manual_seed(m + n + k)

    def random(rows, columns):
        blocks = torch.randn((rows, columns // 128), generator=generator, device="cuda").mul(2)
        spread = blocks.exp().repeat_interleave(128, dim=1)
        values = torch.randn((rows, columns), generator=generator, device="cuda")
        return (values * spread).bfloat16()

    x = cast_1x128(random(m, k), scale_format, columns=False).rows
    if n // 128 % 2:
        return x, cast_128x128(random(k, n), scale_format, rows=False).columns
    return x, cast_128x128(random(n, k), scale_format, columns=False).rows


def ours(x, w, cluster=2, **more):
    out = torch.full((x.codes.shape[0], w.codes.shape[0]), float("nan"), device="cuda").bfloat16()
    assert hopper_gemm.unfit(x, w, out, **more) is None
    hopper_gemm.matmul(x, w, out, cluster=cluster, **more)
    torch.cuda.synchronize()
    return out


def same_bits(got, want):
    different = (got.view(torch.int16) != want.view(torch.int16)).sum().item()
    assert not different, f"{different} of {got.numel()} elements differ"


def is_cublaslt_s(x, w, got, **more):
    size = (x.codes.shape[0], w.codes.shape[0])
    want = torch.empty(size, dtype=torch.bfloat16, device="cuda")
    same_bits(got, cublaslt.matmul(w, x, True, want, **more))


@pytest.mark.parametrize("scale_format", ["power_of_two", "float32"])
@pytest.mark.parametrize("size", SMALL, ids=str)
@CLUSTERS
def test_small(cluster, size, scale_format):
    x, w = operands(*size, scale_format)
    is_cublaslt_s(x, w, ours(x, w, cluster))
    more = torch.randn(size[0], size[1], device="cuda").mul(30).bfloat16()
    for terms in ({"bias": more[0]}, {"add": more}):
        is_cublaslt_s(x, w, ours(x, w, cluster, **terms), **terms)


def test_it_is_trusted_here():
    assert hopper_gemm.reason(0) is None


@pytest.mark.parametrize("scale_format", ["power_of_two", "float32"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_models(name, scale_format):
    x, w = operands(*PRODUCTS[name], scale_format)
    is_cublaslt_s(x, w, ours(x, w))


@pytest.mark.parametrize("terms", ["", "bias", "add"], ids=["alone", "bias", "add"])
@CLUSTERS
def test_again_and_again(cluster, terms):
    """Beside others of its kind, then alone in full size: the same bits each time."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    for size, turns in (
        ((8192, 2048, 1536), 60),
        ((16384, 8960, 1536), 30),
        ((8192, 1536, 8960), 30),
    ):
        x, w = operands(*size, "power_of_two")
        past = torch.randn(size[0], size[1], device="cuda").bfloat16()
        more = {"bias": {"bias": past[0]}, "add": {"add": past}}.get(terms, {})
        want, wrong = ours(x, w, cluster, **more), []
        for turn in range(turns):
            with torch.cuda.stream(
                streams[turn % 3] if turns == 60 else torch.cuda.current_stream()
            ):
                got = hopper_gemm.matmul(x, w, torch.empty_like(want), cluster=cluster, **more)
                wrong.append((got.view(torch.int16) != want.view(torch.int16)).sum())
        torch.cuda.synchronize()
        assert not sum(wrong).item(), f"{size}: {[int(count) for count in wrong]} elements differ"
