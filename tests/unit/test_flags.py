"""flags.expand: every rule by hand. Real parsers are in tests/megatron/test_parsers.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fp8_ext.checkpoint.layout import CheckpointLayout
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import flags, linear_loss
from megatron_fp8_ext.megatron_plugin.refusals import REFUSALS, WITHOUT_EFFECT

OPTIONS = frozenset({flags.RESHARDABLE, *flags.CPU_VALUES, *flags.CPU_SWITCHES})
GPU = flags.Facts(options=OPTIONS)
CPU = flags.Facts(options=OPTIONS, has_gpu=False, fp8_gap="there is no GPU")
DIST = "--use-distributed-optimizer"
INFIR2 = ("--fp8-recipe", "infir2")


def facts(**changes):
    return flags.Facts(**{"options": OPTIONS, **changes})


def layout(optimizer, fp8_params=False):
    return CheckpointLayout(Path("ckpt/iter_0000004"), 4, {}, optimizer, fp8_params)


def added(argv, given):
    """What expand appended to the user's own words."""
    out = flags.expand(argv, given).argv
    return [token for token in out if token not in argv or token in ("blockwise",)]


def test_infir2_with_distributed_optimizer_keeps_weights_in_fp8():
    out = flags.expand(["--bf16", DIST, "--save", "x", *INFIR2], GPU)
    assert out.argv == (
        "--bf16", DIST, "--save", "x", "--fp8-recipe", "blockwise", "--fp8-format", "e4m3",
        "--fp8-param-gather", "--dist-ckpt-optim-fully-reshardable",
    )  # fmt: skip
    assert out.env == {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "0"}
    assert not out.emulated


def test_equals_sign_and_last_one_wins():
    out = flags.expand(["--bf16", "--fp8-recipe=delayed", "--fp8-recipe=infir2"], GPU)
    assert out.argv == ("--bf16", "--fp8-recipe", "blockwise", "--fp8-format", "e4m3")


def test_reshardable_only_where_something_is_saved_and_the_parser_knows_it():
    assert flags.RESHARDABLE not in flags.expand(["--bf16", DIST, *INFIR2], GPU).argv
    old = facts(options=frozenset())
    out = flags.expand(["--bf16", DIST, "--save", "x", *INFIR2], old).argv
    assert flags.RESHARDABLE not in out and "--fp8-param-gather" in out


def test_optimizer_layout_is_never_switched():
    out = flags.expand(["--bf16", "--save", "x", *INFIR2], GPU)
    assert DIST not in out.argv and "--fp8-param-gather" not in out.argv
    assert "weights stay BF16: --use-distributed-optimizer is not in the command" in out.notes[0]


@pytest.mark.parametrize(
    ("optimizer", "fp8_params", "extra", "gathers"),
    [
        ("whole buffers", False, [], False),
        ("whole buffers", False, ["--no-load-optim"], True),
        ("whole buffers", False, ["--finetune"], True),
        ("whole buffers", True, [], True),
        ("by parameter", False, [], True),
        ("none", False, [], True),
    ],
)
def test_param_gather_follows_the_loaded_checkpoint(optimizer, fp8_params, extra, gathers):
    given = facts(checkpoint=layout(optimizer, fp8_params))
    out = flags.expand(["--bf16", DIST, "--load", "ckpt", *extra, *INFIR2], given)
    assert ("--fp8-param-gather" in out.argv) is gathers
    if not gathers:
        assert "iter_0000004 holds its optimizer state as whole BF16 buffers" in out.notes[0]
        assert flags.RESHARDABLE in out.notes[0]


@pytest.mark.parametrize(
    ("iteration", "extra", "adds"),
    [
        (0, [], ["--no-load-optim", flags.MAIN_PARAMS]),
        (4, [], []),
        (4, ["--finetune"], ["--no-load-optim", flags.MAIN_PARAMS]),
        (4, ["--no-load-optim"], [flags.MAIN_PARAMS]),
        (0, ["--no-load-optim", flags.MAIN_PARAMS], []),
        (0, ["--no-fp8-param-gather"], []),
    ],
)
def test_a_start_from_weights_alone_is_not_rounded_to_fp8(iteration, extra, adds):
    """Megatron would copy its main parameters from the FP8 weights."""
    given = facts(
        checkpoint=CheckpointLayout(Path("ckpt/release"), iteration, {}, "none", False),
        options=OPTIONS | {flags.MAIN_PARAMS},
    )
    argv = ["--bf16", DIST, "--load", "ckpt", *extra, *INFIR2]
    new = added(argv, given)
    assert [flag for flag in new if flag in ("--no-load-optim", flags.MAIN_PARAMS)] == adds
    # Megatron 0.19 would load into the FP8 weights first, and round the main parameters all the same.
    streams = replace(given, options=given.options | {flags.NO_STREAM})
    whole = flags.MAIN_PARAMS in (*adds, *extra)
    assert added(argv, streams) == [*new, *([flags.NO_STREAM] if whole else [])]
    assert flags.NO_STREAM not in added([*argv, flags.NO_STREAM], streams)


@pytest.mark.parametrize(
    "extra", [["--optimizer-cpu-offload"], ["--ckpt-format", "torch"], ["--no-fp8-param-gather"]]
)
def test_param_gather_stays_off_with(extra):
    out = flags.expand(["--bf16", DIST, *extra, *INFIR2], GPU)
    assert "--fp8-param-gather" not in out.argv
    assert "weights stay BF16" in out.notes[0]
    assert "--no-fp8-param-gather" not in out.argv


def test_param_gather_written_by_the_user_is_an_error_where_impossible():
    with pytest.raises(UserError, match="--fp8-param-gather is not possible here: --use-dist"):
        flags.expand(["--bf16", "--fp8-param-gather", *INFIR2], GPU)
    with pytest.raises(UserError, match="--no-fp8-param-gather contradicts --fp8-param-gather"):
        flags.expand(["--bf16", "--fp8-param-gather", "--no-fp8-param-gather", *INFIR2], GPU)


def test_infir2_rl_pins_fp32_scales():
    out = flags.expand(["--bf16", "--fp8-recipe", "infir2-rl"], GPU)
    assert out.env == {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}
    assert "FP32 scales" in out.notes[0]


def test_bf16_switches_off():
    out = flags.expand(["--bf16", "--lr", "1", "--fp8-recipe", "bf16"], GPU)
    assert out.argv == ("--bf16", "--lr", "1") and out.env == {}
    with pytest.raises(UserError, match="bf16 contradicts --fp8-format"):
        flags.expand(["--fp8-format", "e4m3", "--fp8-recipe", "bf16"], GPU)


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.flag)
def test_each_refusal_names_both_flags_and_a_mend(row):
    argv = ["--bf16", row.flag, "something", *INFIR2]
    with pytest.raises(UserError) as error:
        flags.expand(argv, CPU if row.where == "emulated" else GPU)
    assert "--fp8-recipe infir2" in str(error.value)
    assert row.flag in str(error.value) and row.mend in str(error.value)


@pytest.mark.parametrize("row", [r for r in REFUSALS if r.allowed], ids=lambda row: row.flag)
def test_allowed_values_pass(row):
    for value in row.allowed:
        flags.expand(["--bf16", row.flag, value, *INFIR2], GPU)


def test_format_written_by_the_user_is_not_doubled():
    out = flags.expand(["--bf16", "--fp8-format", "e4m3", *INFIR2], GPU)
    assert out.argv.count("--fp8-format") == 1


@pytest.mark.parametrize("flag", WITHOUT_EFFECT)
def test_flags_without_effect_are_named(flag):
    out = flags.expand(["--bf16", flag, *INFIR2], GPU)
    assert any(flag in note and "without effect" in note for note in out.notes)


def test_needs_bf16_and_te_layers():
    with pytest.raises(UserError, match="needs --bf16"):
        flags.expand([*INFIR2], GPU)
    with pytest.raises(UserError, match="contradicts --transformer-impl local"):
        flags.expand(["--bf16", "--transformer-impl", "local", *INFIR2], GPU)


@pytest.mark.parametrize(
    ("variable", "value", "recipe"),
    [
        ("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1", "infir2"),
        ("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "0", "infir2-rl"),
        ("NVTE_BACKWARD_OVERRIDE", "high_precision", "infir2"),
    ],
)
def test_contradicting_environment_is_an_error(variable, value, recipe):
    with pytest.raises(UserError, match=variable):
        flags.expand(["--bf16", "--fp8-recipe", recipe], facts(environ={variable: value}))


def test_unknown_recipe_suggests_the_nearest():
    with pytest.raises(UserError, match="unknown --fp8-recipe 'infr2': did you mean 'infir2'"):
        flags.expand(["--fp8-recipe", "infr2"], GPU)


@pytest.mark.parametrize("name", flags.NATIVE_RECIPES)
def test_megatrons_own_recipes_pass_through(name):
    argv = ("--bf16", "--fp8-format", "hybrid", "--fp8-recipe", name)
    assert flags.expand(argv, GPU).argv == argv


def test_native_fp8_without_te_is_an_error_not_quiet_bf16():
    with pytest.raises(UserError, match="train in BF16 without a word"):
        flags.expand(
            ["--fp8-format", "hybrid"], facts(fp8_gap="TransformerEngine is not installed")
        )


def test_without_te_on_a_gpu_the_recipe_stops_or_is_emulated_on_request():
    broken = facts(fp8_gap="TransformerEngine is not installed; pip install it")
    with pytest.raises(UserError, match=r"TransformerEngine is not installed.*--fp8-emulate"):
        flags.expand(["--bf16", *INFIR2], broken)
    out = flags.expand(["--bf16", "--fp8-emulate", *INFIR2], broken)
    assert out.emulated and ("--transformer-impl", "local") == out.argv[-3:-1]
    assert "EMULATED" in out.notes[1]
    with pytest.raises(UserError, match="--fp8-emulate contradicts"):
        flags.expand(
            ["--bf16", "--fp8-emulate", "--transformer-impl", "transformer_engine", *INFIR2], broken
        )


def test_own_flags_need_a_recipe():
    with pytest.raises(UserError, match="--fp8-emulate needs one of our recipes"):
        flags.expand(["--fp8-emulate"], GPU)


def test_cpu_replaces_what_only_a_gpu_can_do_and_says_so():
    argv = [
        "--bf16", DIST, "--transformer-impl", "transformer_engine", "--attention-backend=flash",
        "--use-precision-aware-optimizer", "--cross-entropy-fusion-impl", "te", "--lr", "1", *INFIR2,
    ]  # fmt: skip
    out = flags.expand(argv, CPU)
    assert out.emulated
    for token in ("transformer_engine", "flash", "te", "--use-precision-aware-optimizer"):
        assert token not in out.argv
    assert out.argv[out.argv.index("--transformer-impl") + 1] == "local"
    assert "--fp8-param-gather" not in out.argv
    assert "no GPU" in out.notes[1] and "EMULATED" in out.notes[1]
    assert "---use-precision-aware-optimizer" in out.notes[2]


def test_cpu_run_in_bf16_is_the_same_command_less_the_recipe():
    argv = ["--bf16", DIST, "--lr", "1"]
    ours = flags.expand([*argv, "--fp8-recipe", "bf16"], CPU).argv
    assert ours == flags.expand(argv, CPU).argv


def test_recipe_travels_in_the_environment():
    given = facts(environ={flags.RECIPE_VARIABLE: "infir2"})
    assert flags.expand(["--bf16"], given).recipe.name == "infir2"


def test_a_run_without_our_flags_is_untouched():
    argv = ("--bf16", "--lr", "1", "--fp16-lm-cross-entropy")
    assert flags.expand(argv, GPU) == flags.Expansion(argv=argv)


def test_expand_is_pure():
    argv, environ = ["--bf16", *INFIR2], {}
    first = flags.expand(argv, facts(environ=environ))
    assert first == flags.expand(argv, facts(environ=environ))
    assert argv == ["--bf16", *INFIR2] and environ == {}


CHUNKED = ("--linear-cross-entropy", "chunked")


@pytest.mark.parametrize("argv", [["--bf16"], ["--bf16", *INFIR2], ["--fp8-recipe", "bf16"]])
@pytest.mark.parametrize("given", [GPU, CPU], ids=["gpu", "cpu"])
def test_chunked_loss_goes_with_every_recipe_and_with_none(argv, given):
    off = flags.expand([*argv, "--linear-cross-entropy=off"], given)
    chunked = flags.expand([*argv, *CHUNKED], given)
    assert (
        chunked.argv == off.argv and chunked.linear_loss == "chunked" and off.linear_loss == "off"
    )
    assert chunked.notes[:-1] == off.notes and "slices of the vocabulary" in chunked.notes[-1]
    # A run with fused layers takes the faster one by itself; others keep Megatron's.
    plain = flags.expand(argv, given)
    if plain.fused.on:
        assert plain.linear_loss == "one-pass" and "slices of the tokens" in plain.notes[-1]
    else:
        assert plain == off


def test_what_wants_the_logits_keeps_them_under_fused_layers():
    for other in set(linear_loss.CONTRADICTIONS) - {"--fp8-output-proj"}:  # which is refused
        plain = flags.expand(["--bf16", "--fp8-recipe", "infir2", "--infir2-fused", other], GPU)
        assert plain.fused.on and plain.linear_loss == "off"
    graphs = ("--cuda-graph-impl", "local")
    assert flags.expand(["--bf16", *INFIR2, *graphs], GPU).linear_loss == "chunked"


@pytest.mark.parametrize("other", linear_loss.CONTRADICTIONS)
def test_what_wants_the_logits_contradicts_the_chunked_loss(other):
    with pytest.raises(UserError, match=f"chunked contradicts {other}: "):
        flags.expand(["--bf16", *CHUNKED, other], GPU)
    assert flags.expand(["--bf16", "--linear-cross-entropy", "off", other], GPU).argv[-1] == other


@pytest.mark.parametrize("value", ["liger", ""])
def test_unknown_loss(value):
    with pytest.raises(UserError, match="give it one of: off, chunked, one-pass"):
        flags.expand(["--bf16", "--linear-cross-entropy", value], GPU)
