from __future__ import annotations

import dataclasses

import pytest

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.recipe import BF16, INFIR2, INFIR2_RL, Cast, FP8Recipe, get_recipe


def test_infir2_is_the_paper_s():
    assert INFIR2.input == INFIR2.grad_output == Cast(dtype="e4m3", block=(1, 128))
    assert INFIR2.weight == Cast(dtype="e4m3", block=(128, 128))
    assert INFIR2.scale_format == "power_of_two" and INFIR2.param_gather
    assert INFIR2.high_precision == ("embedding", "LM head", "norms", "attention")


def test_rl_differs_only_in_its_scales():
    same = dataclasses.replace(
        INFIR2_RL, name="infir2", scale_format="power_of_two", summary=INFIR2.summary,
        source=INFIR2.source,
    )  # fmt: skip
    assert same == INFIR2 and INFIR2_RL.scale_format == "float32"


def test_bf16_has_no_casts():
    assert not BF16.is_fp8 and BF16.environment == {}


@pytest.mark.parametrize("name", ["infir2", "infir2-rl", "bf16"])
def test_built_ins_come_through_entry_points(name):
    assert get_recipe(name).name == name


def test_a_recipe_no_gemm_can_compute_is_refused():
    with pytest.raises(UserError, match="no block-scaled GEMM"):
        FP8Recipe(name="x", summary="", weight=Cast(block=(1, 128)))
    with pytest.raises(UserError, match="all be cast or all be None"):
        FP8Recipe(name="x", summary="", input=None)
    with pytest.raises(UserError, match="neither"):
        FP8Recipe(name="x", summary="", scale_format="e8m0")
