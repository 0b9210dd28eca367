"""slime's real parser with our flags: expansion, stages, unknown flags, preflight; and "
"leftovers without slime."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
import trees

from megatron_fp8_ext import recipe
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.slime_plugin import checkout, launch, leftovers
from megatron_fp8_ext.slime_plugin.stages import STAGES

CODE = r"""
import json, sys, os
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import flags, import_hook, run
from megatron_fp8_ext.recipe import get_recipe
from megatron_fp8_ext.slime_plugin import launch
words, recipe = json.loads(sys.argv[1]), get_recipe(sys.argv[2])
run.current.gpus_elsewhere = True
sys.argv = ["train.py", *launch.implied(words, recipe)]
import_hook.install()
try:
    args, notes = launch.parse(recipe)
except UserError as error:
    print("REFUSED", error); sys.exit(0)
keys = ("fp8 fp8_recipe fp8_ext_recipe eps_clip eps_clip_high use_tis rollout_max_response_len rollout_temperature "
    "advantage_estimator custom_megatron_init_path fp8_ext_next_init length_penalty_buffer global_batch_size "
    "dynamic_sampling_filter_path max_dropped_groups").split()
print("ARGS", json.dumps({k: getattr(args, k, None) for k in keys}))
"""

MODEL = (
    "--num-layers 2 --hidden-size 512 --ffn-hidden-size 1024 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --add-qkv-bias --disable-bias-linear --swiglu --normalization "
    "RMSNorm --norm-epsilon 1e-6 "
    "--use-rotary-position-embeddings --rotary-base 1000000 --vocab-size 1000 "
    "--untie-embeddings-and-output-weights "
    "--micro-batch-size 1"
).split()
QUANTIZATION = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
}  # fmt: skip


@pytest.fixture
def served(tmp_path):
    """A served checkpoint's config.json (slime reads no weights to parse)."""
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 512, "intermediate_size": 1024,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000, "vocab_size": 1000, "tie_word_embeddings": False, "quantization_config": QUANTIZATION,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "ref").mkdir()
    return tmp_path


def parse(tree, served, recipe, *extra):
    layout = "--actor-num-nodes 1 --actor-num-gpus-per-node 1 --rollout-num-gpus 1 --prompt-data x.jsonl".split()
    where = [
        "--hf-checkpoint",
        str(served),
        "--ref-load",
        str(served / "ref"),
        "--input-key",
        "prompt",
    ]
    words = [*MODEL, *layout, *where, *STAGES["1"].flags(), "--fp8-recipe", recipe, *extra]
    return trees.python(tree, CODE, json.dumps(words), recipe, **trees.engine(tree))


@pytest.mark.slime
@pytest.mark.parametrize("tree", trees.params())
def test_slimes_parser_takes_a_stage_and_our_recipe(tree, served):
    done = parse(
        tree,
        served,
        "infir2-rl",
        "--custom-megatron-init-path",
        "acme.init",
        "--max-dropped-groups",
        "9",
    )
    assert "ARGS" in done.stdout, done.stdout[-2000:] + done.stderr[-3000:]
    args = json.loads(done.stdout.split("ARGS ")[1].splitlines()[0])
    assert (args["fp8"], args["fp8_recipe"], args["fp8_ext_recipe"]) == (
        "e4m3",
        "blockwise",
        "infir2-rl",
    )
    assert (args["eps_clip"], args["eps_clip_high"], args["use_tis"]) == (0.2, 0.28, True)
    assert (args["rollout_max_response_len"], args["rollout_temperature"]) == (8192, 1.0)
    assert args["global_batch_size"] == 2048 and args["advantage_estimator"] == "grpo"
    assert (
        args["custom_megatron_init_path"] == launch.INIT
        and args["fp8_ext_next_init"] == "acme.init"
    )
    assert args["max_dropped_groups"] == 9


@pytest.mark.slime
@pytest.mark.parametrize("tree", trees.params())
def test_mixed_scales_and_unknown_flags_stop_the_command(tree, served):
    mixed = parse(tree, served, "infir2")
    assert "REFUSED --fp8-recipe infir2 trains with power_of_two scales" in mixed.stdout, (
        mixed.stderr[-3000:]
    )
    typo = parse(tree, served, "infir2-rl", "--sglang-mem-fracton-static", "0.5")
    assert "REFUSED slime and Megatron know no --sglang-mem-fracton-static" in typo.stdout or (
        typo.returncode == 2
        and "unrecognized arguments: --sglang-mem-fracton-static" in typo.stderr
    )


def test_leftovers_are_what_every_parser_left(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--one", "1", "--two=2", "--tvo", "3"])
    parsers = []
    for flag in ("--one", "--two"):
        parser = argparse.ArgumentParser()
        parser.add_argument(flag)
        parsers.append(parser)
    with leftovers.watch() as seen:
        for parser in parsers:
            parser.parse_known_args()
        argparse.ArgumentParser().parse_known_args(["--other"])  # not this command line
    assert seen.unknown() == ["--tvo"]
    with pytest.raises(UserError, match="know no --tvo: did you mean --two"):
        seen.check()


def test_stages_differ_in_length_and_temperature_only():
    one, two = STAGES["1"].flags(), STAGES["2"].flags()
    differing = {one[i - 1] for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b}
    assert differing == {
        "--rollout-max-response-len",
        "--rollout-temperature",
        "--max-tokens-per-gpu",
    }
    assert "--custom-reward-post-process-path" in STAGES["2"].flags(length_penalty=True)


def test_slime_is_found_or_said_to_be_missing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"SLIME_PATH = .* is not a slime checkout: no train\.py"):
        checkout.find({"SLIME_PATH": str(tmp_path)})
    (tmp_path / "slime").mkdir()
    (tmp_path / "slime" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="unrelated statistics package"):
        checkout.find({})


def test_a_start_from_weights_alone_keeps_them_in_bf16(tmp_path):
    """slime's main parameters are copies of the model's weights: FP8 ones would round them."""
    gather, keep = launch.GATHER, "--no-fp8-param-gather"

    def words(*more):
        return launch.implied(["--ref-load", "hf", *more], recipe.INFIR2_RL)

    assert keep in words()
    assert keep in words("--load", str(tmp_path))  # nothing saved yet
    assert keep not in words(gather)
    assert keep not in words("--fp8-emulate")
    assert words(keep).count(keep) == 1
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    assert keep not in words("--load", str(tmp_path))  # its layout decides
    assert keep not in launch.implied(["--ref-load", "hf"], recipe.BF16)
