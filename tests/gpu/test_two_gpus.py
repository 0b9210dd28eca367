"""The fused path on two GPUs (NCCL): tensor, sequence, data, pipeline parallel, beside TransformerEngine's.

pytest tests/gpu/test_two_gpus.py     about 3 minutes
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
    pytest.skip("needs two Hopper GPUs", allow_module_level=True)
pytest.importorskip("transformer_engine.pytorch", reason="needs TransformerEngine")

pytestmark = pytest.mark.gpu
# A rank's tokens and features are whole blocks of 128.
SHAPE = ("--hidden-size", "256", "--ffn-hidden-size", "512")
COMMON = (*SHAPE, "--use-distributed-optimizer", "--no-gradient-accumulation-fusion")
TENSOR = "--tensor-model-parallel-size 2"


@pytest.mark.parametrize(
    "flags",
    [
        TENSOR,
        f"{TENSOR} --sequence-parallel",
        f"{TENSOR} --sequence-parallel --infir2-stash",
        f"{TENSOR} --sequence-parallel --recompute-granularity selective --recompute-modules mlp",
        f"{TENSOR} --sequence-parallel --untie-embeddings-and-output-weights",
        "--overlap-grad-reduce --overlap-param-gather",
        "--pipeline-model-parallel-size 2",
    ],
    ids=lambda flags: flags.replace("--", "").replace(TENSOR[2:], "tensor"),
)
def test_losses_are_te_s(flags, train):
    words = [word for word in flags.split() if word != "--infir2-stash"]
    infir2 = (*COMMON, *words, "--fp8-recipe", "infir2")
    stash = ("--infir2-stash",) if "stash" in flags else ()
    ours = train(*infir2, "--infir2-fused", *stash, processes=2)
    assert any("fused layers: norm + linear" in line for line in ours.said), ours.said
    theirs = train(*infir2, "--no-infir2-fused", processes=2)
    assert len(ours.losses) == len(theirs.losses) > 0
    for iteration, loss in theirs.losses.items():
        gap = ours.losses[iteration] / loss - 1
        print(f"{iteration}: {loss:.5f} ({gap:+.1e})")
        assert abs(gap) <= 2e-3
