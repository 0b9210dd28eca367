"""The presets' commands by slime's real parser, as our launcher gives them to it."""

from __future__ import annotations

import json

import pytest
import trees

from megatron_fp8_ext import presets
from megatron_fp8_ext.launch import plan, request

pytestmark = pytest.mark.slime
CODE = r"""
import json, sys, types
import torch
from megatron_fp8_ext.megatron_plugin import import_hook, run
from megatron_fp8_ext.recipe import get_recipe
from megatron_fp8_ext.slime_plugin import launch
words, name = json.loads(sys.argv[1]), sys.argv[2]
if not torch.cuda.is_available():  # as on a Hopper GPU: parsing needs none
    torch.cuda.get_device_properties = lambda *a: types.SimpleNamespace(major=9, minor=0)
    torch.cuda.get_device_capability = lambda *a: (9, 0)
recipe = get_recipe(name)
run.current.gpus_elsewhere = True
sys.argv = ["train.py", *launch.implied(words, recipe)]
import_hook.install()
args, notes = launch.parse(recipe)
keys = "fp8 fp8_recipe fp8_ext_recipe num_gpus_per_node rotary_base custom_megatron_init_path lr".split()
print("ARGS", json.dumps({k: getattr(args, k, None) for k in keys}))
"""
QUANTIZATION = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["qwen2.5-7b-rl-stage1", "qwen2.5-7b-rl-stage2-bf16", "qwen2.5-1.5b-sft-stage1"]
)
@pytest.mark.parametrize("tree", trees.params())
def test_slimes_parser_takes_a_preset(tree, name, tmp_path):
    preset = presets.get(name)
    config = {**presets.model_facts(preset.model), "architectures": ["Qwen2ForCausalLM"]}
    if preset.stage == "rl" and not name.endswith("-bf16"):
        config["quantization_config"] = QUANTIZATION
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "init").mkdir()
    inputs = {"data": tmp_path / "data.jsonl", "model": tmp_path, "init": tmp_path / "init"}
    asked = request.Request(preset=preset, inputs={k: str(v) for k, v in inputs.items()})
    found = plan.build(request.with_set(asked, ["gpus-per-node=4"]), plan.Facts(config=config))
    recipe = found.value("--fp8-recipe")
    words = json.dumps(list(found.argv))
    environment = {**found.environment, **trees.engine(tree)}
    done = trees.python(tree, CODE, words, recipe, **environment)
    assert "ARGS" in done.stdout, done.stderr[-3000:]
    args = json.loads(done.stdout.split("ARGS ")[1].splitlines()[0])
    assert args["custom_megatron_init_path"] == "megatron_fp8_ext.slime_plugin.init"
    assert (args["num_gpus_per_node"], args["rotary_base"]) == (4, 1000000)
    assert args["fp8"] == (None if recipe == "bf16" else "e4m3")
    assert recipe == "bf16" or args["fp8_ext_recipe"] == recipe
