"""What expand produces is accepted by the real parsers: megatron-core 0.17, 0.18, 0.19; core_v0.14.0.

The wheels are unpacked beside the environment, not into it. For core_v0.14.0, whose wheel has no parser,
the checkout is used when there is one (MEGATRON_LM_PATH or third_party/Megatron-LM), and the recorded
list of its flags always.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, megatron_lm, run

from megatron_fp8_ext.megatron_plugin import flags

pytestmark = pytest.mark.megatron
RECORDED = Path(__file__).with_name("core_v0.14.0_flags.json")
INFIR2 = ["--fp8-recipe", "infir2"]
BASE = ["--bf16", "--use-distributed-optimizer", "--save", "x"]

PARSE = """
import os, sys
import megatron_fp8_ext
from megatron_fp8_ext.megatron_plugin import compat
compat.process_fp8_gap = lambda: (True, None)  # as on a Hopper GPU: parsing needs none
megatron_fp8_ext.install()
from megatron.training.arguments import parse_args
args = parse_args(ignore_unknown_args="--ignore" in sys.argv)
import json
print("PARSED", json.dumps({k: str(getattr(args, k, None)) for k in (
    "fp8", "fp8_recipe", "fp8_param_gather", "use_distributed_optimizer", "fp8_ext_recipe",
    "dist_ckpt_optim_fully_reshardable", "bf16")}))
print("ENV", os.environ.get("NVTE_FP8_BLOCK_SCALING_FP32_SCALES"))
"""


def parse(path: Path, *argv: str, code: int = 0) -> dict[str, str]:
    outcome = run([sys.executable, "-W", "ignore", "-c", PARSE, *argv], PYTHONPATH=f"{path}:{ROOT}")
    assert outcome.code == code, outcome.output[-3000:]
    if code:
        return {"error": outcome.said[-1]}
    line = next(x for x in outcome.output.splitlines() if x.startswith("PARSED"))
    scales = next(x for x in outcome.output.splitlines() if x.startswith("ENV"))
    return {**json.loads(line.removeprefix("PARSED ")), "scales": scales.removeprefix("ENV ")}


def test_infir2_becomes_native_flags(wheel):
    _, path = wheel
    found = parse(path, *BASE, *INFIR2)
    assert found == {
        "fp8": "e4m3", "fp8_recipe": "blockwise", "fp8_param_gather": "True",
        "use_distributed_optimizer": "True", "fp8_ext_recipe": "infir2",
        "dist_ckpt_optim_fully_reshardable": "True", "bf16": "True", "scales": "0",
    }  # fmt: skip


def test_unknown_arguments_mode_works_too(wheel):
    """slime parses with ignore_unknown_args."""
    _, path = wheel
    found = parse(path, *BASE, "--fp8-recipe", "infir2-rl", "--ignore", "--rollout-batch-size", "8")
    assert (found["fp8_recipe"], found["scales"]) == ("blockwise", "1")


def test_errors_reach_the_user_as_one_line(wheel):
    _, path = wheel
    assert "did you mean 'infir2'" in parse(path, "--fp8-recipe", "infr2", code=2)["error"]
    error = parse(path, "--bf16", "--yaml-cfg", "x.yaml", *INFIR2, code=2)["error"]
    assert "contradicts --yaml-cfg" in error and "fp8_recipe: blockwise" in error
    odd = ["--bf16", "--seq-length", "1001", "--micro-batch-size", "1", *INFIR2]
    assert "use --seq-length 992 or 1008" in parse(path, *odd, code=2)["error"]


def test_native_runs_are_untouched(wheel):
    _, path = wheel
    found = parse(path, "--bf16", "--fp8-format", "hybrid", "--fp8-recipe", "delayed")
    assert (found["fp8"], found["fp8_recipe"], found["fp8_ext_recipe"]) == (
        "hybrid", "delayed", "None",
    )  # fmt: skip


@pytest.mark.checkout
def test_checkout_becomes_native_flags():
    path = megatron_lm()
    found = parse(path, *BASE, *INFIR2)
    assert (found["fp8"], found["fp8_recipe"]) == ("e4m3", "blockwise")
    assert (found["fp8_param_gather"], found["scales"]) == ("True", "0")


def recorded_parser() -> argparse.ArgumentParser:
    """core_v0.14.0's parser, rebuilt from the recorded list of its flags."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    types = {"int": int, "float": float}
    for row in json.loads(RECORDED.read_text()):
        options = {"dest": row["dest"], "action": row["action"], "default": row["default"]}
        if row["action"] == "store":
            options["nargs"] = row["nargs"]
            options["choices"] = row["choices"]
            options["type"] = types.get(row["type"], str)
        parser.add_argument(*row["flags"], **options)
    return parser


@pytest.mark.parametrize("recipe", ["infir2", "infir2-rl", "bf16"])
@pytest.mark.parametrize("has_gpu", [True, False])
def test_core_v0_14_accepts_what_expand_produces(recipe, has_gpu):
    parser = recorded_parser()
    facts = flags.Facts(
        options=frozenset(parser._option_string_actions),
        has_gpu=has_gpu,
        fp8_gap=None if has_gpu else "there is no GPU",
    )
    out = flags.expand([*BASE, "--fp8-recipe", recipe], facts)
    parsed = parser.parse_args(list(out.argv))
    assert parsed.fp8 == (None if recipe == "bf16" else "e4m3")
    assert parsed.fp8_param_gather == (has_gpu and recipe != "bf16")
    if not has_gpu:
        assert parsed.transformer_impl == "local" and parsed.distributed_backend == "gloo"


def test_recorded_list_is_the_checkouts():
    path = megatron_lm()
    code = (
        "import argparse, json; import megatron.training.arguments as a\n"
        "p = a.add_megatron_arguments(argparse.ArgumentParser())\n"
        "print('FLAGS', json.dumps(sorted(f for x in p._actions for f in x.option_strings)))"
    )
    outcome = run([sys.executable, "-W", "ignore", "-c", code], PYTHONPATH=str(path))
    assert outcome.code == 0, outcome.output[-2000:]
    real = set(json.loads(outcome.output.split("FLAGS ")[1].splitlines()[0])) - {"-h", "--help"}
    assert real == {flag for row in json.loads(RECORDED.read_text()) for flag in row["flags"]}
