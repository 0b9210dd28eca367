"""The CUDA kernels write what the Triton kernels write: codes, scales and BF16 intermediates."""

from __future__ import annotations

import concurrent.futures

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from kernel_cases import FORMATS, assert_same_cast, edge_cases, ulps_apart  # noqa: E402
from test_kernel_fusions import same_stash  # noqa: E402

from megatron_fp8_ext.fp8 import reference  # noqa: E402
from megatron_fp8_ext.kernels import hopper, rmsnorm, rope, stash, swiglu  # noqa: E402
from megatron_fp8_ext.kernels.cast import cast_1x128, cast_1x128_and_sum  # noqa: E402

pytestmark = pytest.mark.gpu
WAYS = ((True, True), (True, False), (False, True))


def test_they_are_used():
    assert hopper.reason(0) is None
    assert hopper.takes(torch.zeros(128, 128, device="cuda", dtype=torch.bfloat16), 128, 128)


@pytest.mark.parametrize("new", [False, True], ids=["loaded before", "compiled there"])
def test_a_thread_without_a_context(new):
    """One that never called CUDA's runtime, as autograd's may be, compiles and launches all the same."""
    x = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    want = cast_1x128(x, "power_of_two")
    del want
    want = cast_1x128(x, "power_of_two")  # blocks of these sizes are in the allocator's cache
    torch.cuda.synchronize()
    if new:
        for cache in (hopper._tile_kernel, hopper._kernel):
            cache.cache_clear()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        got = thread.submit(cast_1x128, x, "power_of_two").result()
    same(got, want)


def same(ours, theirs):
    for a, b in ((ours.rows, theirs.rows), (ours.columns, theirs.columns)):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a.codes, b.codes)
            assert torch.equal(a.scale_inv.view(torch.int32), b.scale_inv.view(torch.int32))


def tiled(x):
    """Whole tiles of a case of any shape."""
    out = torch.zeros(
        -(-x.shape[0] // 128) * 128, -(-x.shape[1] // 128) * 128, dtype=torch.bfloat16
    )
    out[: x.shape[0], : x.shape[1]] = x.to(torch.bfloat16)
    return out.to("cuda")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("case", edge_cases())
def test_edge_cases(case, scale_format, way):
    x = tiled(edge_cases()[case])
    same(cast_1x128(x, scale_format, *way), cast_1x128(x, scale_format, *way, warps=8))


@pytest.mark.parametrize("m, k", [(128, 128), (16384, 2048), (384, 640)])
def test_cast_and_sum_of_columns(m, k):
    torch.manual_seed(0)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16) * torch.logspace(-6, 2, k).cuda()
    x = x.bfloat16()
    got, total = cast_1x128_and_sum(x, "power_of_two")
    same(got, cast_1x128(x, "power_of_two"))
    want = x.double()
    assert total.dtype == torch.float32
    assert ((total - want.sum(dim=0)).abs() <= 1e-6 * want.abs().sum(dim=0)).all()
    assert torch.equal(total, cast_1x128_and_sum(x, "power_of_two")[1])


@pytest.mark.parametrize("parts", [1, 33, 660])
def test_sums_of_parts(parts):
    values = torch.randn(parts, 1536, device="cuda")
    total = hopper.sum_of_parts(values, torch.float32)
    torch.testing.assert_close(total.double(), values.double().sum(0), rtol=1e-5, atol=1e-4)
    assert torch.equal(total, hopper.sum_of_parts(values, torch.float32)), "deterministic"
    assert torch.equal(total.bfloat16(), hopper.sum_of_parts(values, torch.bfloat16))
    before = torch.full_like(total, 3.0)
    hopper.sum_of_parts(values, torch.float32, add_to=before)
    assert torch.equal(before, total + 3.0)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_every_bit_pattern(scale_format):
    """All BF16 numbers, infinities and NaNs included, beside others of every size."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for shuffle in range(3):
        order = torch.randperm(65536, generator=torch.Generator().manual_seed(shuffle))
        x = (bits if shuffle == 0 else bits[order]).reshape(256, 256).to("cuda").contiguous()
        got = cast_1x128(x, scale_format)
        assert_same_cast(got.quantized(), reference.quantize_rows(x, scale_format))
        columns = reference.quantize_columns(x, scale_format)
        assert_same_cast(got.quantized(columns=True), columns)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("m, f", [(128, 128), (384, 640), (2048, 8960)])
def test_swiglu(m, f, scale_format):
    torch.manual_seed(0)
    x = torch.randn(m, 2 * f, device="cuda", dtype=torch.bfloat16) * 8
    dy = torch.randn(m, f, device="cuda", dtype=torch.bfloat16) * 1e-3
    for way in WAYS:
        ours = swiglu.swiglu_cast(x, scale_format, *way, keep=True)
        theirs = swiglu.swiglu_cast(x, scale_format, *way, keep=True, warps=8)
        assert ulps_apart(ours.kept, theirs.kept.float()) <= 1
        same(ours.cast, cast_1x128(ours.kept, scale_format, *way))
    y = ours.kept
    for again in (False, True):
        ours = swiglu.swiglu_backward_cast(dy, x, scale_format, keep=True, y_columns=again)
        theirs = swiglu.swiglu_backward_cast(dy, x, scale_format, keep=True, warps=16)
        assert ulps_apart(ours.kept, theirs.kept.float()) <= 1
        same(ours.cast, cast_1x128(ours.kept, scale_format))
        if again:
            same(ours.y, cast_1x128(y, scale_format, rows=False))


def test_swiglu_of_what_is_not_finite_or_very_large():
    values = torch.tensor(
        [float("inf"), -float("inf"), float("nan"), 3e38, -3e38, 88.5, -88.5, -100, 0]
    )
    gate = values.repeat(128, 15)[:, :128]
    up = values.repeat_interleave(15).repeat(128, 1)[:, :128]
    x = torch.cat((gate, up), dim=1).to("cuda", torch.bfloat16)
    ours = swiglu.swiglu_cast(x, "power_of_two", keep=True).kept.float()
    theirs = (torch.nn.functional.silu(x[:, :128].float()) * x[:, 128:].float()).bfloat16().float()
    # The kernel's sigmoid counts numbers below 2^-126 as zero, those of gates below -87.3.
    small = x[:, :128] < -87
    assert torch.equal(ours[~small].isnan(), theirs[~small].isnan())
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    finite = ~theirs.isnan() & (theirs.abs() > 1e-37)
    assert torch.allclose(ours[finite & ~small], theirs[finite & ~small], rtol=2**-7)
    gone = finite & small & theirs.isfinite()
    assert ((ours[gone] == 0) | (ours[gone] == theirs[gone])).all()


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("m, h", [(256, 128), (1024, 1536), (512, 3584)])
def test_rmsnorm_columns(m, h, scale_format):
    torch.manual_seed(0)
    x = torch.randn(m, h, device="cuda", dtype=torch.bfloat16) * 3
    gain = torch.randn(h, device="cuda", dtype=torch.bfloat16)
    normed = rmsnorm.rmsnorm_cast(x, gain, 1e-6, scale_format, columns=False, keep=True)
    columns = rmsnorm.rmsnorm_columns(x, gain, normed.rstd, scale_format)
    same(columns, rmsnorm.rmsnorm_columns(x, gain, normed.rstd, scale_format, warps=16))
    same(columns, cast_1x128(normed.kept, scale_format, rows=False))


@pytest.mark.parametrize("m, f", [(128, 128), (384, 640), (2048, 8960)])
def test_stash(m, f):
    torch.manual_seed(0)
    x = torch.randn(m, 2 * f, device="cuda", dtype=torch.bfloat16) * 8
    x[:, ::97] *= 40
    x[3, 5], x[7, 140 % f], x[9, 30:70] = float("nan"), float("inf"), 0
    x[11, :32] = 1e-38
    made = swiglu.swiglu_cast(x, "power_of_two", columns=False, stash=True, keep=True)
    plain = swiglu.swiglu_cast(x, "power_of_two", columns=False, keep=True)
    assert torch.equal(made.kept.view(torch.int16), plain.kept.view(torch.int16))
    same(made.cast, plain.cast)
    same_stash(made.stash, stash.quantize(x))
    triton = swiglu.swiglu_cast(x, "power_of_two", columns=False, stash=True, warps=8).stash
    same_stash(made.stash, triton)
    # The backward from the stash is the backward from what the stash stands for, in FP32.
    dy = torch.randn(m, f, device="cuda", dtype=torch.bfloat16) * 1e-3
    ours = swiglu.swiglu_backward_cast(dy, made.stash, "power_of_two", keep=True, y_columns=True)
    exact = made.stash.dequantize().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    y = torch.nn.functional.silu(gate) * up
    (dx,) = torch.autograd.grad(y, exact, dy.float())
    finite = dx.isfinite()
    assert torch.equal(finite, ours.kept.isfinite())
    # The kernel's sigmoid counts numbers below 2^-126 as zero, those of gates below -87.3.
    small = (gate.detach() < -87).repeat(1, 2)
    assert ulps_apart(ours.kept[finite & ~small], dx[finite & ~small]) <= 2
    assert (ours.kept[finite & small].abs() <= 1e-30).all()
    same(ours.cast, cast_1x128(ours.kept, "power_of_two"))
    theirs = swiglu.swiglu_backward_cast(dy, made.stash, "power_of_two", y_columns=True, warps=16)
    codes = ours.y.columns.codes, theirs.y.columns.codes
    assert (codes[0] != codes[1]).float().mean() < 1e-3


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("m, h", [(1, 128), (37, 896), (1000, 1536), (4096, 3584), (130, 8192)])
def test_rmsnorm_rows(m, h, scale_format):
    torch.manual_seed(0)
    x = torch.randn(m, h, device="cuda", dtype=torch.bfloat16) * 3
    gain = torch.randn(h, device="cuda", dtype=torch.bfloat16)
    got = rmsnorm.rmsnorm_cast(x, gain, 1e-6, scale_format, columns=False, keep=True)
    exact = torch.nn.functional.rms_norm(x.double(), (h,), gain.double(), 1e-6)
    assert ulps_apart(got.kept, exact.float()) <= 1
    rstd = (x.double().square().mean(dim=1) + 1e-6).rsqrt()
    torch.testing.assert_close(got.rstd.double(), rstd, rtol=1e-6, atol=0)
    want = reference.quantize_rows(got.kept, scale_format)
    assert_same_cast(got.cast.quantized(), want)
    quiet = rmsnorm.rmsnorm_cast(x, gain, 1e-6, scale_format, columns=False)
    same(quiet.cast, got.cast)


@pytest.mark.parametrize("m, h", [(1, 128), (37, 896), (5000, 1536), (4096, 3584), (130, 8192)])
def test_rmsnorm_backward(m, h):
    torch.manual_seed(0)
    x = torch.randn(m, h, device="cuda", dtype=torch.bfloat16) * 3
    dy = torch.randn(m, h, device="cuda", dtype=torch.bfloat16) * 1e-3
    gain = torch.randn(h, device="cuda", dtype=torch.bfloat16)
    rstd = rmsnorm.rmsnorm_cast(x, gain, 1e-6, "power_of_two", columns=False).rstd

    def backward():
        return rmsnorm.rmsnorm_backward_cast(
            dy, x, gain, rstd, "power_of_two", rows=False, columns=False
        )

    got, again = backward(), backward()
    assert torch.equal(got.dx, again.dx) and torch.equal(got.dweight, again.dweight)
    xd, gd = x.double().requires_grad_(), gain.double().requires_grad_()
    y = torch.nn.functional.rms_norm(xd, (h,), gd, 1e-6)
    dx, dgain = torch.autograd.grad(y, (xd, gd), dy.double())
    # Where the two terms cancel, FP32's rounding of them shows.
    near = (got.dx.double() - dx).abs() <= 2.0**-8 * dx.abs() + 1e-6 * dy.double().abs().max()
    assert near.all()
    torch.testing.assert_close(got.dweight.double(), dgain, rtol=1e-4, atol=1e-5)
    # With what reaches x past the norm, rounded once.
    past = torch.randn(m, h, device="cuda", dtype=torch.bfloat16) * 1e-3
    summed = rmsnorm.rmsnorm_backward_cast(
        dy, x, gain, rstd, "power_of_two", residual=past, rows=False, columns=False
    )
    assert torch.equal(summed.dweight, got.dweight)
    want = dx + past.double()
    slack = 2.0**-8 * want.abs() + 1e-6 * dy.double().abs().max()
    assert ((summed.dx.double() - want).abs() <= slack).all()
    # NaN stays in its row, and reaches the weight.
    dy[0, 3] = float("nan")
    spoiled = backward()
    assert spoiled.dx[0].isnan().all() and not spoiled.dx[1:].isnan().any()
    assert spoiled.dweight.isnan().sum() == 1


@pytest.mark.parametrize("head", rope.HEADS)
@pytest.mark.parametrize("s, b, groups, queries", [(5, 1, 1, 1), (384, 2, 2, 6), (130, 3, 4, 7)])
def test_qkv_split_and_rotated(s, b, groups, queries, head):
    torch.manual_seed(0)
    qkv = torch.randn(s, b, groups, (queries + 2) * head, device="cuda", dtype=torch.bfloat16)
    qkv.requires_grad_()
    frequencies = 1e6 ** (-torch.arange(0, head, 2, device="cuda") / head)
    angles = torch.outer(torch.arange(s, device="cuda").float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)[:, None, None]
    split = [queries * head, head, head]
    assert rope.takes(qkv, angles, split)
    got = rope.split_and_rotate(qkv, angles)
    exact = qkv.detach().double().requires_grad_()
    parts = [p.reshape(s, b, -1, head) for p in exact.split(split, dim=-1)]
    cosine, sine = angles.cos().double(), angles.sin().double()

    def turn(x):
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat((-second, first), dim=-1) * sine

    want = [turn(parts[0]), turn(parts[1]), parts[2]]
    grads = [torch.randn_like(part) for part in got]
    for ours, theirs in zip(got, want, strict=True):
        # Where the two terms cancel, FP32's rounding of them shows.
        assert ((ours.double() - theirs).abs() <= 2.0**-8 * theirs.abs() + 1e-6).all()
    assert torch.equal(got[2].flatten(), parts[2].to(torch.bfloat16).flatten())
    torch.autograd.backward(got, grads)
    torch.autograd.backward(want, [grad.double() for grad in grads])
    near = 2.0**-8 * exact.grad.abs() + 1e-6
    assert ((qkv.grad.double() - exact.grad).abs() <= near).all()
    te = pytest.importorskip("transformer_engine.pytorch.attention.rope")
    for ours, theirs in zip(
        got, te.apply_fused_qkv_rotary_pos_emb(qkv, angles, angles, split), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-6)


def test_other_rotations_are_left_alone():
    qkv = torch.zeros(4, 1, 1, 384, device="cuda", dtype=torch.bfloat16)
    interleaved = torch.rand(4, 1, 1, 128, device="cuda")
    assert not rope.takes(qkv, interleaved, [128, 128, 128])
    assert not rope.takes(qkv, torch.rand(4, 1, 1, 64, device="cuda"), [128, 128, 128])
