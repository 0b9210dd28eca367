"""`--infir2-fused`, `--no-infir2-fused` and `--infir2-stash`, as part of what a command becomes."""

from __future__ import annotations

import pytest

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import flags, fused_flags

GPU = flags.Facts(options=frozenset())
BASE = ("--bf16", "--fp8-recipe", "infir2")


@pytest.mark.parametrize(
    ("written", "inherited", "want"),
    [
        ((), None, fused_flags.DEFAULT),
        (("--infir2-fused",), None, "on"),
        (("--infir2-fused", "--infir2-stash"), None, "stash"),
        (("--no-infir2-fused",), None, "off"),
        (("--infir2-stash",), None, "stash"),
        ((), "off", "off"),
        ((), "on", "on"),
        (("--infir2-fused",), "off", "on"),
        ((), "stash", "stash"),
        (("--infir2-stash",), "off", "stash"),
    ],
)
def test_what_a_run_asks_for(written, inherited, want):
    environ = {} if inherited is None else {fused_flags.VARIABLE: inherited}
    out = flags.expand([*BASE, *written], flags.Facts(options=frozenset(), environ=environ))
    assert out.fused.text == want
    assert not set(out.argv) & set(fused_flags.FLAGS)
    assert fused_flags.may_be_on([*BASE, *written], environ) == (want != "off")
    layers = {
        "on": "fused where possible |",
        "off": "TransformerEngine's (",
        "stash": "kept in 8 bits",
    }
    assert layers[want] in out.notes[0]


def test_emulated_layers_are_not_fused():
    out = flags.expand([*BASE, "--infir2-stash", "--fp8-emulate"], GPU)
    assert out.fused == fused_flags.NOT_FUSED and "layers:" not in out.notes[0]
    assert any("--infir2-stash: emulated layers keep BF16" in note for note in out.notes)


def test_our_recipes_alone_are_fused():
    for argv in (["--bf16"], ["--bf16", "--fp8-recipe", "bf16"]):
        assert flags.expand(argv, GPU).fused == fused_flags.NOT_FUSED


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((*BASE, "--infir2-stash", "--no-infir2-fused"), "contradicts"),
        ((*BASE, "--infir2-fused", "--no-infir2-fused"), "contradicts"),
        (("--bf16", "--infir2-stash"), "needs one of our recipes"),
        (("--bf16", "--fp8-recipe", "bf16", "--no-infir2-fused"), "contradicts --no-infir2-fused"),
    ],
)
def test_contradictions(argv, message):
    with pytest.raises(UserError, match=message):
        flags.expand(argv, GPU)


def test_a_wrong_variable():
    facts = flags.Facts(options=frozenset(), environ={fused_flags.VARIABLE: "yes"})
    with pytest.raises(UserError, match="give it off, on or stash"):
        flags.expand(BASE, facts)


@pytest.mark.parametrize(
    ("variable", "value", "known"),
    [
        ("MEGATRON_FP8_EXT_GEMM", "cublas", "te or cublaslt"),
        ("MEGATRON_FP8_EXT_KERNELS", "cuda", "triton"),
    ],
)
def test_an_unknown_backend_is_refused(variable, value, known):
    facts = flags.Facts(options=frozenset(), environ={variable: value})
    with pytest.raises(UserError, match=f"{variable}={value} .*give it {known}, or unset it"):
        flags.expand([*BASE], facts)
    for right in fused_flags.BACKENDS[variable]:
        facts = flags.Facts(options=frozenset(), environ={variable: right})
        assert flags.expand([*BASE], facts).fused.on


def test_the_kernels_read_these_variables():
    pytest.importorskip("triton")
    from megatron_fp8_ext.kernels import cublaslt, hopper

    assert set(fused_flags.BACKENDS) == {hopper.VARIABLE, cublaslt.VARIABLE}
