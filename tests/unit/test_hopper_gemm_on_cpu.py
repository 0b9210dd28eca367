"""The block-scaled GEMM's source on the CPU: right results, no race, and mutations of it are found."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import subprocess
from pathlib import Path

import cuda_on_cpu
import pytest
from kernel_cases import DEVICE, torch

import hopper_gemm_on_cpu as on_cpu  # isort: skip
from megatron_fp8_ext.fused.gemm import ReferenceGemm
from megatron_fp8_ext.kernels import hopper, hopper_gemm, nvrtc, support
from megatron_fp8_ext.kernels.cast import BlockCast, Operand, cast_1x128, cast_128x128

pytestmark = [
    pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="needs g++"),
    pytest.mark.skipif(DEVICE != "cpu", reason="tests/gpu/test_hopper_gemm.py runs it on the GPU"),
]
FORMS = {
    hopper_gemm.Form(): "product",
    hopper_gemm.Form(bias=True): "with a bias",
    hopper_gemm.Form(add=True): "with a matrix",
    hopper_gemm.Form(cluster=1): "alone",
    hopper_gemm.Form(add=True, cluster=1): "alone, with a matrix",
}
CLUSTERS = pytest.mark.parametrize("cluster", [1, 2])


@pytest.fixture(autouse=True)
def on_this_cpu(monkeypatch):
    """Maps and launches that the CPU understands; two pairs of processors."""
    monkeypatch.setattr(hopper_gemm, "encode", on_cpu.encode)
    monkeypatch.setattr(hopper, "launch", lambda found, device, *rest: found(*rest))
    monkeypatch.setattr(support, "processors", lambda device: 4)
    hopper_gemm._arguments.cache_clear()
    yield
    hopper_gemm._arguments.cache_clear()


def use(monkeypatch, seed=0, change=lambda text: text):
    """`matmul` runs here, with its copies and threads in this order."""
    monkeypatch.setattr(
        hopper_gemm,
        "_kernel",
        lambda device, form: on_cpu.Kernel(form, seed, change),
    )


@functools.cache
def case(m, n, k, dtype="power_of_two"):
    """Casts of random operands whose blocks have different scales, and the product in FP32."""
    generator = torch.Generator().manual_seed(m + n + k)

    def random(rows):
        blocks = torch.randn((rows, k // 128), generator=generator).mul(2).exp()
        spread = blocks.repeat_interleave(128, dim=1)
        return (torch.randn((rows, k), generator=generator) * spread).bfloat16()

    x, w = cast_1x128(random(m), dtype, columns=False), cast_128x128(random(n), dtype)
    return x, w, ReferenceGemm().fprop(x, w)


def product(x: BlockCast, w: Operand, cluster=2, **more):
    out = torch.full((x.rows.codes.shape[0], w.codes.shape[0]), float("nan")).bfloat16()
    assert hopper_gemm.unfit(x.rows, w, out, **more) is None
    return hopper_gemm.matmul(x.rows, w, out, cluster=cluster, **more)


def agrees(got, want):
    """But for BF16's last step, where the order of the sums shows."""
    want = want.float()
    size = want.abs().mean()
    return bool(((got.float() - want).abs() <= 2.0**-7 * want.abs() + 2.0**-16 * size).all())


@CLUSTERS
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (128, 128, 128),  # one block of K; a part of a tile, a cluster's idle half
        (256, 256, 256),
        (384, 384, 384),  # odd numbers of tiles
        (640, 128, 1024),  # more blocks of K than stages, several tiles a block
        (128, 1152, 896),
    ],
)
def test_shapes(cluster, m, n, k, monkeypatch):
    use(monkeypatch, seed=m + n + k)
    x, w, want = case(m, n, k)
    assert agrees(product(x, w.rows, cluster), want)


def test_groups_of_rows(monkeypatch):
    """More tiles along M than a group has: every tile is made once."""
    use(monkeypatch)
    for m in (2048, 2432):
        x, w, want = case(m, 384, 128)
        for cluster in (1, 2):
            assert agrees(product(x, w.rows, cluster), want)


def test_the_transposed_weight(monkeypatch):
    """As dgrad has it, with scales that are not powers of two."""
    use(monkeypatch)
    dy = case(256, 128, 384, "float32")[0]
    w = case(128, 384, 256, "float32")[1]
    got = product(dy, w.columns)
    assert agrees(got, ReferenceGemm().dgrad(dy, w))


@CLUSTERS
@pytest.mark.parametrize("size", [(128, 128, 128), (384, 384, 384), (640, 128, 1024)], ids=str)
def test_with_a_bias_or_a_matrix(cluster, size, monkeypatch):
    """Added in FP32, before the rounding; the matrix comes into the result's place in shared memory."""
    use(monkeypatch, seed=sum(size))
    m, n, _ = size
    x, w, _ = case(*size)
    exact = x.quantized().dequantize() @ w.quantized().dequantize().t()
    generator = torch.Generator().manual_seed(0)
    scale = exact.abs().mean()
    bias = (torch.randn(n, generator=generator) * scale).bfloat16()
    past = (torch.randn(m, n, generator=generator) * scale).bfloat16()
    got = product(x, w.rows, cluster, bias=bias)
    assert agrees(got, (exact + bias.float()).bfloat16())
    got = product(x, w.rows, cluster, add=past)
    assert agrees(got, (exact + past.float()).bfloat16())


def test_the_order_of_events_does_not_show(monkeypatch):
    x, w, _ = case(384, 384, 384)
    results = []
    for seed in range(4):
        use(monkeypatch, seed)
        results += [product(x, w.rows, cluster) for cluster in (1, 2)]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_self_check(monkeypatch):
    use(monkeypatch)
    assert hopper_gemm.failure(torch.device("cpu")) is None
    for before, after, name in (
        ("upper[wave], sum", "lower[wave], sum", "the product is wrong"),
        (
            "first = __fadd_rn(first, low(more))",
            "first = first",
            "the product with a bias is wrong",
        ),
        ("lane % 4 * 4)", "lane % 2 * 4)", "the product with a matrix is wrong"),
    ):
        use(monkeypatch, change=functools.partial(replaced, before, after))
        assert name in hopper_gemm.failure(torch.device("cpu"))


def replaced(before, after, text):
    assert before in text, "the mutation is of code that is not there"
    return text.replace(before, after)


# What is changed, and what shows it: a message of the machine's, or a wrong result.
MUTATIONS = {
    "no wait for an empty stage": (
        "      barrier_wait(shared + EMPTY_AT + stage.index * 8, stage.parity ^ 1);\n",
        "",
        "went over|more arrivals|wait for each other|nobody waited",
    ),
    "no wait for a full stage": (
        "      barrier_wait(shared + FULL_AT + stage.index * 8, stage.parity);\n",
        "",
        "wrong|nobody waited|went over|never read",
    ),
    "the wrong parity": ("stage.parity ^ 1);", "stage.parity);", "wait for each other"),
    "the wrong row's scale": ("load_shared(scales + 32)", "load_shared(scales + 16)", "wrong"),
    "the wrong block's scale": ("w_scale = later;", "w_scale *= 1.0f;", "wrong"),
    "the next tile's scale": (": next.w_scales(a))", ": of_tile)", "wrong"),
    "no swizzle of the products": (" | (u64)1 << 62", "", "wrong|nobody has read"),
    "no swizzle of the result": (" ^ row % 8)", ")", "wrong|two threads wrote"),
    "the wrong rows apart": ("(1024 >> 4) << 32", "(512 >> 4) << 32", "wrong|nobody has read"),
    "the wrong step along K": ("x + i * 2, w + i * 2", "x + i, w + i", "wrong|multiple"),
    "sums not begun anew": ("i > 0);", "true);", "is not emulated"),
    "no wait for the products": ("        mma_wait();\n", "", "wrong|emulated|a product reads"),
    "released too early": (
        "        mma_commit();\n",
        "        mma_commit();\n        if (wave == WAVES - 1) release(shared, stage, lane, true);\n",
        "went over|more arrivals|nobody waited|wait for each other",
    ),
    "no wgmma.fence": ("        mma_begin();\n", "", "wgmma.fence"),
    "too few bytes": ("X_BYTES + W_BYTES + SCALE_BYTES);", "X_BYTES + W_BYTES);", "."),
    "no fence for the store": ("    copy_fence();\n", "", "had no fence"),
    "no wait for the store": ("else if (thread == 0) wait_stores_read();", "", "still to read"),
    "ended before the store": ("  if (thread == 0) wait_stores();\n", "", "before its stores"),
    "no fence for the barriers": ("    barrier_init_fence();\n", "", "had no fence"),
    "no barrier before the store": (
        "    copy_fence();\n    sync_threads(1 + group, 128);\n",
        "    copy_fence();\n",
        "wrong|had no fence|still to read",
    ),
    "too many registers": ("<MULTIPLIER_REGISTERS>", "<MULTIPLIER_REGISTERS + 16>", "each other"),
}
OF_ADDENDS = {
    "over what is still to be stored": (
        "            wait_stores_read();\n",
        "",
        "has still to read",
    ),
    "no wait for it": (
        "if (ADD) barrier_wait(addend, parity);\n    else ",
        "",
        "wrong|nobody waited|never read|still to read|nobody has read",
    ),
    "the wrong parity": ("(addend, parity)", "(addend, parity ^ 1)", "wrong|nobody waited|read"),
    "too few bytes": ("addend, 2 * D_PART_BYTES", "addend, D_PART_BYTES", "."),
    "the wrong swizzle": ("(j + i / 2) % 8 ^ upper % 8", "(j + i / 2) % 8", "wrong"),
}
OF_CLUSTERS = {
    "arrived at one's own block alone": (
        "barrier_arrive_at(empty, lane)",
        "barrier_arrive_at(empty, cluster_rank())",
        "more arrivals|went over|nobody waited",
    ),
    "half of the arrivals": (
        "CLUSTER * MULTIPLIERS * 4",
        "MULTIPLIERS * 4",
        "more arrivals|went over|nobody waited",
    ),
    "ended before the other block": (
        "  sync_all();  // nothing",
        "  //",
        "has ended|wait for each other",
    ),
    "the other block's half": ("m + rank * (TILE_M / 2)", "m", "wrong"),
    "halves in one place": ("x_to + rank * (TILE_M / 2 * BLOCK_K)", "x_to", "."),
}


def plain(cluster):
    x, w, want = case(384, 384, 1024)
    return agrees(product(x, w.rows, cluster), want)


def with_a_matrix(cluster):
    x, w, want = case(768, 384, 128)  # the matrix comes as late as the first block of K
    return agrees(product(x, w.rows, cluster, add=want), 2 * want.float())


def found(monkeypatch, right, cluster, before, after, message, seeds=6):
    """Whether one of some orders of events shows the mutation, as `message` says."""
    for seed in range(seeds):
        use(monkeypatch, seed, functools.partial(replaced, before, after))
        try:
            said = "" if right(cluster) else "wrong"
        except on_cpu.Failure as error:
            said = str(error)
        if said:
            return re.search(message, said) or pytest.fail(f"found, but for another reason: {said}")
    return False


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations(name, monkeypatch):
    assert found(monkeypatch, plain, 1, *MUTATIONS[name])


@pytest.mark.parametrize("name", OF_ADDENDS)
def test_mutations_of_addends(name, monkeypatch):
    assert found(monkeypatch, with_a_matrix, 1, *OF_ADDENDS[name])


@pytest.mark.parametrize("name", OF_CLUSTERS)
def test_mutations_of_clusters(name, monkeypatch):
    assert found(monkeypatch, plain, 2, *OF_CLUSTERS[name])


def test_what_does_not_fit():
    x, w, _ = case(256, 256, 256)
    out = torch.empty(256, 256, dtype=torch.bfloat16)

    def said(to=out, rows=x.rows, **more):
        return hopper_gemm.unfit(rows, w.rows, to, **more)

    assert said() is None and said(add=out) is None and said(bias=out[0]) is None
    assert "multiples of 128" in said(out[:200], Operand(x.rows.codes[:200], x.rows.scale_inv))
    assert "float32" in said(out.float())
    assert "contiguous" in said(out.t()) and "contiguous" in said(add=out.t())
    shifted = torch.empty(256 * 256 + 4, dtype=torch.bfloat16)[4:].view(256, 256)
    assert "multiple of 16" in said(shifted)
    assert said(bias=shifted.view(-1)[2:258]) is None
    assert "multiple of 4" in said(bias=shifted.view(-1)[1:257])
    assert "a bias and a matrix" in said(bias=out[0], add=out)
    assert "the bias is torch.float32" in said(bias=out[0].float())
    assert "torch.float32 [256, 256] is added" in said(add=out.float())


@pytest.mark.parametrize("form", FORMS, ids=FORMS.get)
def test_it_compiles_for_hopper(form, tmp_path):
    """NVRTC, as at run time; the machine code has the instructions, each as often as it should."""
    try:
        nvrtc._nvrtc()
    except nvrtc.CudaError as error:
        pytest.skip(str(error))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(hopper_gemm.compile_kernel(form))
    assert ctypes.sizeof(hopper_gemm._Arguments) == 704
    found = importlib.util.find_spec("triton")
    disassembler = Path(found.origin).parent / "backends/nvidia/bin/cuobjdump"
    if not disassembler.exists():
        pytest.skip("this Triton comes without cuobjdump")

    def dump(flag):
        done = subprocess.run([disassembler, flag, cubin], capture_output=True, text=True)
        return done.stdout

    assert "STACK:0" in dump("--dump-resource-usage"), "accumulators went to memory"
    code = dump("-sass")
    shared = form.cluster > 1
    for instruction, count in (
        ("QGMMA.64x128x32.F32.E4M3.E4M3", 8),
        ("WARPGROUP.DEPBAR", 2),  # more of them: products wait for each other
        ("UTMALDG.2D", 3 + 2 * form.add),
        ("UTMALDG.2D.MULTICAST", int(shared)),
        ("UTMASTG.2D", 2),
        ("STSM.16.M88.4", 16),
        ("USETMAXREG", 2),
        ("SYNCS.ARRIVE.TRANS64", 2 + form.add),
        ("UCGABAR_WAIT", 2 * shared),
    ):
        assert code.count(instruction) == count, instruction
    # The scales are compared before a stage is given back, which makes the arrival wait for their loads.
    assert re.search(r"ISETP\.NE\S* P\d, PT, R\d+, -0x1, P", code)
    # A fence of the whole GPU belongs to the start and the end of a cluster, not to each block of K.
    start, end = code.index("USETMAXREG"), code.rindex("UTMALDG")
    assert "MEMBAR.ALL.GPU" not in code[start:end]
