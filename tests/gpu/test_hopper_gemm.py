"""Our own block-scaled GEMM on a Hopper GPU: cuBLASLt's bits, in every tiling, and again.

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
TILINGS = hopper_gemm.TILINGS
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


def ours(x, w, tiling=hopper_gemm.TILING, **more):
    out = torch.full((x.codes.shape[0], w.codes.shape[0]), float("nan"), device="cuda").bfloat16()
    assert hopper_gemm.unfit(x, w, True, out, **more) is None
    hopper_gemm.matmul(x, w, True, out, tiling=tiling, **more)
    torch.cuda.synchronize()
    return out


def same_bits(got, want):
    kind = torch.int16 if got.dtype is torch.bfloat16 else torch.int32
    different = (got.view(kind) != want.view(kind)).sum().item()
    assert not different, f"{different} of {got.numel()} elements differ"


def is_cublaslt_s(x, w, got, **more):
    size = (x.codes.shape[0], w.codes.shape[0])
    want = torch.empty(size, dtype=torch.bfloat16, device="cuda")
    same_bits(got, cublaslt.matmul(w, x, True, want, **more))


def gradient_is_cublaslt_s(m, n, k, scale_format, tiling=hopper_gemm.TILING):
    x, dy = operands(n, 128, k, scale_format)[0], operands(m, 128, k, scale_format)[0]
    nan = torch.full((m, n), float("nan"), device="cuda")
    assert hopper_gemm.unfit(dy, x, False, nan) is None
    for start, accumulate in ((nan, False), (torch.randn_like(nan), True)):
        got, want = start.clone(), start.clone()
        hopper_gemm.matmul(dy, x, False, got, accumulate, tiling=tiling)
        torch.cuda.synchronize()
        same_bits(got, cublaslt.matmul(x, dy, False, want, accumulate))


@pytest.mark.parametrize("scale_format", ["power_of_two", "float32"])
@pytest.mark.parametrize("size", SMALL, ids=str)
@pytest.mark.parametrize("name", list(reversed(TILINGS)))  # the simplest first
def test_small(name, size, scale_format):
    x, w = operands(*size, scale_format)
    is_cublaslt_s(x, w, ours(x, w, TILINGS[name]))
    more = torch.randn(size[0], size[1], device="cuda").mul(30).bfloat16()
    for terms in ({"bias": more[0]}, {"add": more}):
        is_cublaslt_s(x, w, ours(x, w, TILINGS[name], **terms), **terms)


@pytest.mark.parametrize("scale_format", ["power_of_two", "float32"])
@pytest.mark.parametrize("size", SMALL, ids=str)
@pytest.mark.parametrize("name", list(reversed(TILINGS)))
def test_small_gradients(name, size, scale_format):
    gradient_is_cublaslt_s(*size, scale_format, TILINGS[name])


def test_it_is_trusted_here():
    assert hopper_gemm.reason(0) is None


@pytest.mark.parametrize("scale_format", ["power_of_two", "float32"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_models(name, scale_format):
    x, w = operands(*PRODUCTS[name], scale_format)
    is_cublaslt_s(x, w, ours(x, w))


@pytest.mark.parametrize("model", LAYERS)
def test_gradients_of_models(model):
    for n, k in LAYERS[model]:
        gradient_is_cublaslt_s(n, k, 8192, "power_of_two")


@pytest.mark.parametrize("name", TILINGS)
def test_again_and_again(name):
    """While others run beside it: the same bits each time."""
    x, w = operands(8192, 2048, 1536, "power_of_two")
    want = ours(x, w, TILINGS[name])
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for turn in range(60):
        with torch.cuda.stream(streams[turn % 3]):
            results.append(
                hopper_gemm.matmul(x, w, True, torch.empty_like(want), tiling=TILINGS[name])
            )
    torch.cuda.synchronize()
    for got in results:
        same_bits(got, want)
