"""The recipe through Megatron's own loop on the CPU: it is emulated, parallel, and never quietly BF16."""

from __future__ import annotations

import pytest
from conftest import EXAMPLE_PACKAGE, ROOT

pytestmark = pytest.mark.megatron
DIST = "--use-distributed-optimizer"
LAYERS, LINEARS, MICROBATCHES, ITERATIONS = 2, 4, 2, 8


def test_recipe_is_emulated_and_counted(infir2_run):
    # qkv, proj, fc1, fc2 of each layer and nothing else: not the embedding, not the LM head.
    expected = LAYERS * LINEARS * MICROBATCHES * ITERATIONS
    assert infir2_run.casts == {
        name: expected
        for name in ("grad columns", "grad rows", "input columns", "input rows", "weight")
    }
    assert any("EMULATED" in line for line in infir2_run.said)


def test_summary_is_one_line_on_rank_0(infir2_run):
    summary = [line for line in infir2_run.said if "--fp8-recipe infir2 ->" in line]
    assert len(summary) == 1
    for part in ("--fp8-recipe blockwise", "--fp8-format e4m3", "power-of-two", "LM head",
                 "seams: ", "add_megatron_arguments"):  # fmt: skip
        assert part in summary[0]


def test_losses_differ_from_bf16_and_follow_it(infir2_run, bf16_run):
    assert infir2_run.losses != bf16_run.losses
    assert infir2_run.losses[1] != bf16_run.losses[1]
    assert infir2_run.losses[8] == pytest.approx(bf16_run.losses[8], rel=5e-3)
    assert infir2_run.losses[8] < infir2_run.losses[1]
    assert not bf16_run.casts


def test_fp32_scales_are_another_recipe(train, infir2_run):
    rl = train(DIST, "--fp8-recipe", "infir2-rl")
    assert rl.casts == infir2_run.casts
    assert rl.losses != infir2_run.losses
    assert rl.losses[8] == pytest.approx(infir2_run.losses[8], rel=5e-3)


def test_stock_megatron_without_te_is_quietly_bf16(tmp_path, train, bf16_run):
    """Why this package must be strict: the same FP8 flags, our seam left out, change nothing."""
    script = tmp_path / "stock.py"
    script.write_text(
        "import sys\n"
        "from megatron_fp8_ext.megatron_plugin import patches, precision, run\n"
        "from megatron_fp8_ext.megatron_plugin.pretrain_gpt import main\n"
        "from megatron_fp8_ext.megatron_plugin import flags\n"
        "# the CPU patches alone: without the precision seam, native flags reach Megatron as they are\n"
        "patches.PATCHES = tuple(p for p in patches.PATCHES if 'fp8_utils' not in p.module\n"
        "                        and 'layers' not in p.module)\n"
        "def unguarded(argv, facts):\n"
        "    out, note = flags.for_cpu(argv, facts.options)\n"
        "    return flags.Expansion(argv=tuple(out), notes=(note,))\n"
        "flags._expand_native = unguarded\n"
        "main()\n"
    )
    stock = train(DIST, "--fp8-recipe", "blockwise", "--fp8-format", "e4m3", script=script)
    assert stock.losses == bf16_run.losses


def test_native_fp8_flags_are_refused_where_they_would_be_bf16(train):
    refused = train("--fp8-recipe", "blockwise", "--fp8-format", "e4m3", ok=False)
    assert refused.code == 2
    assert "Megatron would train in BF16 without a word" in refused.said[-1]
    assert not refused.iterations


def test_first_and_last_layers_stay_bf16_when_asked(train, infir2_run):
    partly = train(DIST, "--fp8-recipe", "infir2", "--num-layers", "3", "--first-last-layers-bf16")
    assert partly.casts["weight"] == infir2_run.casts["weight"] // 2


@pytest.mark.parametrize(
    ("name", "processes", "flags"),
    [
        ("TP=2 with sequence parallel", 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        ("TP=2", 2, "--tensor-model-parallel-size 2"),
        ("DP=2", 2, ""),
        ("CP of one, overlapped DP=2", 2, "--overlap-grad-reduce --overlap-param-gather"),
        ("PP=2", 2, "--pipeline-model-parallel-size 2"),
        ("PP=2 untied", 2, "--pipeline-model-parallel-size 2 --untie"),
        ("untied", 1, "--untie"),
    ],
)
def test_parallel_runs_continue_one_checkpoint_alike(
    name, processes, flags, train, tmp_path_factory, one_checkpoint
):
    """From one checkpoint of TP=PP=DP=1, every layout gives the same losses.

    Tolerance 2e-3 relative: BF16 sums in another order, and under TP the blocks of proj and fc2
    inputs end at the shard.
    """
    flags = flags.replace("--untie", "--untie-embeddings-and-output-weights")
    start, reference = one_checkpoint("--untie" in flags)
    outcome = train(
        DIST, "--fp8-recipe", "infir2", "--load", start, "--override-opt-param-scheduler",
        *flags.split(), processes=processes,
    )  # fmt: skip
    assert outcome.casts["weight"] > 0
    assert sorted(outcome.losses) == [5, 6, 7, 8]
    # Megatron logs the mean of the first two iterations after a start as the second's.
    for iteration in (5, 7, 8):
        assert outcome.losses[iteration] == pytest.approx(reference[iteration], rel=2e-3), name


@pytest.fixture(scope="session")
def one_checkpoint(train, tmp_path_factory):
    """(checkpoint of iteration 4, losses of the run that continued it), tied or untied."""
    cache: dict[bool, tuple[str, dict]] = {}

    def make(untied: bool):
        if untied not in cache:
            folder = str(tmp_path_factory.mktemp("start"))
            extra = ["--untie-embeddings-and-output-weights"] if untied else []
            common = [DIST, "--fp8-recipe", "infir2", "--dist-ckpt-optim-fully-reshardable", *extra]
            train(*common, "--save", folder, "--save-interval", "4", "--exit-interval", "4")
            resumed = train(*common, "--load", folder)
            cache[untied] = (folder, resumed.losses)
        return cache[untied]

    return make


@pytest.mark.parametrize("optimizer", [[DIST], []], ids=["distributed", "plain"])
def test_save_stop_resume_is_exact(train, tmp_path, optimizer):
    save = ["--save", str(tmp_path), "--save-interval", "4"]
    whole = train(*optimizer, "--fp8-recipe", "infir2")
    train(*optimizer, "--fp8-recipe", "infir2", *save, "--exit-interval", "4")
    rest = train(*optimizer, "--fp8-recipe", "infir2", "--load", str(tmp_path))
    assert sorted(rest.losses) == [5, 6, 7, 8]
    for iteration in (5, 7, 8):  # 6 is logged as the mean of 5 and 6
        assert rest.losses[iteration] == whole.losses[iteration]
    assert rest.iterations[-1].grad_norm == whole.iterations[-1].grad_norm
    assert rest.iterations[-1].learning_rate == whole.iterations[-1].learning_rate


@pytest.mark.parametrize(
    "flags",
    [
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "--recompute-granularity selective",
    ],
    ids=["full", "selective"],
)
def test_recomputation_changes_nothing(train, infir2_run, flags):
    outcome = train(DIST, "--fp8-recipe", "infir2", *flags.split())
    assert outcome.losses == infir2_run.losses


@pytest.mark.parametrize("flags", ["--num-experts 4", "--multi-latent-attention"])
def test_what_cannot_be_emulated_is_refused_by_name(train, flags):
    """Both train in FP8 on a GPU: docs/results/."""
    refused = train("--fp8-recipe", "infir2", *flags.split(), ok=False)
    assert refused.code == 2 and f"contradicts {flags}" in refused.said[-1]


def test_precision_aware_optimizer_flag_is_dropped_on_the_cpu(train, infir2_run):
    outcome = train(DIST, "--fp8-recipe", "infir2", "--use-precision-aware-optimizer")
    assert outcome.losses == infir2_run.losses
    assert any("--use-precision-aware-optimizer" in line for line in outcome.said)


def test_a_strangers_recipe_trains(train, infir2_run):
    path = f"{ROOT}:{EXAMPLE_PACKAGE}"
    acme = train(DIST, "--fp8-recipe", "acme-fp32", PYTHONPATH=path)
    rl = train(DIST, "--fp8-recipe", "infir2-rl")
    assert acme.losses == rl.losses


def test_the_plain_optimizer_trains_too(train):
    outcome = train("--fp8-recipe", "infir2")
    assert outcome.casts["weight"] == 128
