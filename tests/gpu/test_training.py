"""The recipe through Megatron's own loop on one Hopper GPU, with TransformerEngine's FP8 GEMMs.

Production flags each train; a stock BF16 checkpoint continues in infir2, and an infir2 one in BF16.
"""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a Hopper GPU", allow_module_level=True)
pytest.importorskip("transformer_engine.pytorch", reason="needs TransformerEngine")

from megatron_fp8_ext.checkpoint import layout  # noqa: E402

pytestmark = pytest.mark.gpu
DIST = "--use-distributed-optimizer"
# apex is not needed for anything else here.
COMMON = (DIST, "--no-gradient-accumulation-fusion")
INFIR2 = ("--fp8-recipe", "infir2")
GRAPHS = "--te-rng-tracker --cuda-graph-impl"
MOE = (
    "--num-experts 4 --moe-grouped-gemm --moe-router-topk 2 --moe-ffn-hidden-size 256 "
    "--moe-token-dispatcher-type alltoall --moe-router-padding-for-quantization"
)
MLA = (
    "--multi-latent-attention --kv-lora-rank 64 --qk-head-dim 32 --qk-pos-emb-head-dim 32 "
    "--v-head-dim 32"
)
SAME = {
    "overlap": "--overlap-grad-reduce --overlap-param-gather",
    "recompute full": "--recompute-granularity full --recompute-method uniform "
    "--recompute-num-layers 1",
    "recompute selective": "--recompute-granularity selective",
    "weights in BF16": "--no-fp8-param-gather",
}
GRAPHED = {
    "cuda graphs, local": f"{GRAPHS} local",
    "cuda graphs, transformer_engine": f"{GRAPHS} transformer_engine",
}
OTHER = {
    "native cross-entropy": "--cross-entropy-loss-fusion --cross-entropy-fusion-impl native",
    "BF16 moments": "--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
    "optimizer offload": "--optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d "
    "--use-precision-aware-optimizer",
    "MoE": MOE,
    "MLA": MLA,
    "FP32 scales": "--fp8-recipe infir2-rl",
    "native names": "--fp8-recipe blockwise --fp8-format e4m3",
}
# CUDA graphs under expandable segments: NCCL cannot register their memory.
ENV = {"NCCL_GRAPH_REGISTER": "0"}


@pytest.fixture(scope="module")
def plain(train):
    outcome = train(*COMMON, *INFIR2, **ENV)
    assert "weights kept in FP8" in outcome.said[0]
    return outcome


@pytest.mark.parametrize("name", SAME)
def test_flags_that_change_no_number(name, train, plain):
    outcome = train(*COMMON, *INFIR2, *SAME[name].split(), **ENV)
    assert outcome.losses == plain.losses


@pytest.fixture(scope="module")
def unfused(train):
    """What CUDA graphs run: TransformerEngine's layers, and the loss that never asks the host."""
    flags = ("--no-infir2-fused", "--linear-cross-entropy", "chunked")
    return train(*COMMON, *INFIR2, *flags, **ENV)


@pytest.mark.parametrize("name", GRAPHED)
def test_graphs_change_no_number_of_the_layers_they_run(name, train, unfused):
    outcome = train(*COMMON, *INFIR2, *GRAPHED[name].split(), **ENV)
    assert any("norm + linear 0 of 4 (4: CUDA graphs)" in line for line in outcome.said)
    assert outcome.losses == unfused.losses


@pytest.mark.parametrize("name", OTHER)
def test_flags_that_train(name, train):
    drop = {"--group-query-attention": False, "--num-query-groups": True} if name == "MLA" else {}
    outcome = train(*COMMON, *INFIR2, *OTHER[name].split(), drop=drop, **ENV)
    assert all(math.isfinite(loss) for loss in outcome.losses.values())
    assert outcome.losses[8] < outcome.losses[1] - 0.5


def test_bf16_is_another_run_and_near(train, plain):
    bf16 = train(*COMMON, "--fp8-recipe", "bf16")
    assert bf16.losses[1] != plain.losses[1]
    assert plain.losses[8] == pytest.approx(bf16.losses[8], rel=5e-3)


def test_save_stop_resume(train, plain, tmp_path):
    save = ("--save", str(tmp_path), "--save-interval", "4")
    train(*COMMON, *INFIR2, *save, "--exit-interval", "4")
    assert layout.find(str(tmp_path)).optimizer == "by parameter"
    rest = train(*COMMON, *INFIR2, "--load", str(tmp_path), "--save", str(tmp_path))
    for iteration in (5, 7, 8):  # 6 is logged as the mean of 5 and 6
        assert rest.losses[iteration] == plain.losses[iteration]


@pytest.mark.parametrize(
    "flags",
    [COMMON, (*COMMON, "--dist-ckpt-optim-fully-reshardable"), COMMON[1:]],
    ids=["distributed", "distributed, reshardable", "plain"],
)
def test_bf16_continues_in_infir2_and_back(flags, train, tmp_path):
    def half(recipe, folder):
        save = ("--save", str(tmp_path / folder), "--save-interval", "4", "--exit-interval", "4")
        return train(*flags, *recipe, *save)

    half((), "bf16")
    onward = train(*flags, *INFIR2, "--load", str(tmp_path / "bf16"))
    same = train(*flags, "--load", str(tmp_path / "bf16"))
    half(INFIR2, "infir2")
    back = train(*flags, "--load", str(tmp_path / "infir2"))  # BF16, no flag of ours
    assert sorted(onward.losses) == sorted(back.losses) == sorted(same.losses) == [5, 6, 7, 8]
    for outcome in (onward, back):
        for ours, theirs in zip(outcome.iterations, same.iterations, strict=True):
            assert ours.learning_rate == theirs.learning_rate
            assert ours.loss == pytest.approx(theirs.loss, rel=5e-3)
    assert onward.losses[8] != same.losses[8]
