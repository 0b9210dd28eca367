"""The recipe inside real Ray actors, and `init` that stops a wrong one before the first step."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from argparse import Namespace

import pytest
from conftest import ROOT

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.recipe import INFIR2, INFIR2_RL
from megatron_fp8_ext.slime_plugin import actor, transport

RECIPE, SCALES = "MEGATRON_FP8_EXT_RECIPE", "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"

RAY = r"""
import os, sys, ray
from megatron_fp8_ext.recipe import get_recipe
from megatron_fp8_ext.slime_plugin import transport
variables = transport.job_variables(get_recipe(sys.argv[1]), os.environ)
transport.adopt_in_driver(variables)
ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, runtime_env=transport.runtime_env(variables, os.environ))
@ray.remote(num_gpus=1)
class Actor:
    def look(self, args):
        import torch
        from megatron_fp8_ext.slime_plugin import transport
        seam = any("megatron_fp8_ext" in repr(f) for f in sys.meta_path)
        found = transport.actor_recipe(args, os.environ)
        return found.name, os.environ[%r], seam, "--fp8-recipe" in sys.argv
    def init(self, args):
        from megatron_fp8_ext.slime_plugin import init
        init(args)
from argparse import Namespace
args = Namespace(fp8="e4m3", train_env_vars={})
# As slime HEAD makes its train actors: the scale format is copied from the driver, "1" if it has none.
env = {"env_vars": {%r: os.environ.get(%r, "1")}}
a = Actor.options(runtime_env=env).remote()
print("LOOK", *ray.get(a.look.remote(args)))
try:
    ray.get(a.init.remote(args))
except Exception as error:
    print("INIT", str(error).strip().splitlines()[-1])
ray.kill(a)
env = {"env_vars": {%r: "0" if sys.argv[1] == "infir2-rl" else "1"}}
b = Actor.options(runtime_env=env).remote()
try:
    ray.get(b.init.remote(args))
except Exception as error:
    print("WRONG", str(error).strip().splitlines()[-1])
""" % (SCALES, SCALES, SCALES, SCALES)  # noqa: UP031


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray (extra `rl`)")
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
@pytest.mark.parametrize(("recipe", "fp32"), [("infir2", "0"), ("infir2-rl", "1")])
def test_name_and_scale_format_inside_a_real_ray_actor(recipe, fp32):
    import os

    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("MEGATRON_FP8", "NVTE_", "RAY_"))
    }
    env |= {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RAY, recipe],
        capture_output=True, text=True, timeout=300, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"LOOK {recipe} {fp32} True False" in done.stdout
    assert (
        "sees no GPU" in done.stdout.split("INIT")[1]
    )  # all else was right; emulation was not asked for
    assert f"recipe {recipe} has" in done.stdout.split("WRONG")[1]


def fake_te(monkeypatch, power_2_scale):
    """The two names `te_scale_format` reads, as TE 2.4 and 2.20 spell them."""
    quantize = types.SimpleNamespace(power_2_scale=power_2_scale)
    module = types.ModuleType("transformer_engine.common.recipe")
    module.Float8BlockScaling = lambda: types.SimpleNamespace(fp8_quant_fwd_weight=quantize)
    for name in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", module)


@pytest.mark.parametrize("recipe", [INFIR2, INFIR2_RL])
def test_init_refuses_what_te_really_imported(monkeypatch, recipe):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(RECIPE, recipe.name)
    for name, value in recipe.environment.items():
        monkeypatch.setenv(name, value)  # right now, but TE was imported before
    fake_te(monkeypatch, power_2_scale=recipe.scale_format != "power_of_two")
    with pytest.raises(UserError, match=r"TransformerEngine was imported with .* scales; set NVTE"):
        actor.init(Namespace(fp8="e4m3"))
    fake_te(monkeypatch, power_2_scale=recipe.scale_format == "power_of_two")
    assert actor.te_scale_format() == recipe.scale_format
    actor._hold_to(recipe, Namespace(fp8="e4m3"))


def test_native_flags_need_a_stated_scale_format():
    new = Namespace(fp8="e4m3", train_env_vars={})
    with pytest.raises(UserError, match="nothing says with which scales"):
        transport.actor_recipe(new, {SCALES: "1"})  # slime HEAD's own default
    stated = Namespace(fp8="e4m3", train_env_vars={SCALES: "1"})
    assert transport.actor_recipe(stated, {SCALES: "1"}) is INFIR2_RL
    assert transport.actor_recipe(new, {SCALES: "0"}) is INFIR2
    old = Namespace(fp8="e4m3")  # 8359c9a has no --train-env-vars and no default
    assert transport.actor_recipe(old, {SCALES: "1"}) is INFIR2_RL
    assert transport.actor_recipe(Namespace(fp8=None), {}) is None


def test_contradictions_are_named():
    with pytest.raises(UserError, match="the command says --fp8-recipe infir2 and"):
        args = Namespace(fp8="e4m3", fp8_ext_recipe="infir2")
        transport.actor_recipe(args, {RECIPE: "infir2-rl"})
    with pytest.raises(UserError, match="ask for no FP8"):
        transport.actor_recipe(Namespace(fp8=None), {RECIPE: "infir2"})
    with pytest.raises(UserError, match="--train-env-vars sets NVTE"):
        transport.check_train_env_vars({SCALES: "1"}, INFIR2)
    job = '{"runtime_env": {"env_vars": {"%s": "1"}}}' % SCALES  # noqa: UP031
    environ = {"RAY_JOB_CONFIG_JSON_ENV_VAR": job}
    with pytest.raises(UserError, match="--runtime-env-json sets"):
        transport.runtime_env(transport.job_variables(INFIR2, {}), environ)
    merged = transport.runtime_env(transport.job_variables(INFIR2_RL, {}), environ)
    assert merged == {"env_vars": {RECIPE: "infir2-rl"}}
