"""Importing does nothing; the autoload door is inert without our flags, never raises, can be shut."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT


def python(code: str, *argv: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_does_nothing():
    code = (
        "import sys; path = list(sys.meta_path); before = set(sys.modules)\n"
        "import megatron_fp8_ext\n"
        "new = {m for m in set(sys.modules) - before if not m.startswith('_')}\n"
        "print(sorted(new - {'megatron_fp8_ext'}), sys.meta_path == path)"
    )
    assert python(code) == "[] True"


AUTOLOAD = (
    "import sys; path = list(sys.meta_path)\n"
    "from megatron_fp8_ext._autoload import autoload; autoload()\n"
    "print(sys.meta_path != path, 'torch' in sys.modules, 'megatron' in sys.modules)"
)


@pytest.mark.parametrize(
    ("argv", "env", "set_up"),
    [
        ([], {}, False),
        (["--bf16", "--lr", "1"], {}, False),
        (["--fp8-recipe", "infir2"], {}, True),
        (["--fp8-recipe=infir2"], {}, True),
        (["--lr-schedule", "wsd"], {}, True),
        (["--wsd-decay-from=ckpt"], {}, True),
        (["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "9"], {}, False),
        (["--fp8-recipe", "infir2"], {"MEGATRON_FP8_EXT": "0"}, False),
        ([], {"MEGATRON_FP8_EXT_RECIPE": "infir2"}, True),
    ],
)
def test_autoload_is_inert_without_our_flags(argv, env, set_up):
    assert python(AUTOLOAD, *argv, **env) == f"{set_up} False False"


def test_autoload_never_raises():
    code = (
        "import sys, megatron_fp8_ext._autoload as door\n"
        "sys.modules['megatron_fp8_ext.megatron_plugin.import_hook'] = None\n"
        "door.autoload(); print('survived')"
    )
    assert python(code, "--fp8-recipe", "infir2") == "survived"


def test_torch_calls_the_door():
    pytest.importorskip("torch")
    code = "import torch, sys; print(any('megatron_fp8_ext' in repr(f) for f in sys.meta_path))"
    assert python(code, "--fp8-recipe", "infir2") == "True"
    assert python(code) == "False"
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    assert python(code, "--fp8-recipe", "infir2", **off) == "False"


def test_module_door_needs_a_script():
    done = subprocess.run(
        [sys.executable, "-m", "megatron_fp8_ext", "nowhere.py"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and "no script at nowhere.py" in done.stderr
