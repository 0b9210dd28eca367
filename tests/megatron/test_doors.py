"""Every way in is the same run; every supported Megatron trains."""

from __future__ import annotations

import os
import sys

import pytest
from conftest import ROOT, megatron_lm, megatron_wheel

pytestmark = pytest.mark.megatron
DIST = "--use-distributed-optimizer"
INFIR2 = (DIST, "--fp8-recipe", "infir2")

# Somebody's own script over Megatron's loop: it sets no seam itself, the door has to.
SCRIPT = "from megatron_fp8_ext.megatron_plugin import pretrain_gpt as gpt\ngpt._pretrain(gpt.datasets)\n"


@pytest.mark.parametrize("door", ["autoload", "module", "install()"])
def test_every_door_is_the_same_run(door, train, infir2_run, tmp_path):
    script = tmp_path / "somebodys_pretrain.py"
    first = {"autoload": "import torch", "module": ""}.get(
        door, "import megatron_fp8_ext; megatron_fp8_ext.install()"
    )
    script.write_text(f"{first}\n{SCRIPT}")
    program = ("-m", "megatron_fp8_ext", str(script)) if door == "module" else (str(script),)
    # Each door alone: torch's is shut for the other two.
    env = {} if door == "autoload" else {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    outcome = train(*INFIR2, script=program, launcher=True, **env)
    assert outcome.losses == infir2_run.losses
    assert outcome.casts == infir2_run.casts


@pytest.mark.parametrize("version", ["0.17.0", "0.18.0"])
def test_older_wheels_train_and_resume(version, train, tmp_path, infir2_run):
    """The run of the suite is the newest; these two have other `pretrain()` protocols."""
    path = f"{megatron_wheel(version)}:{ROOT}"
    save = ("--save", str(tmp_path), "--save-interval", "4")
    whole = train(*INFIR2, *save, PYTHONPATH=path)
    assert whole.casts == infir2_run.casts
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    rest = train(*INFIR2, "--load", str(tmp_path), PYTHONPATH=path)
    for iteration in (5, 7, 8):  # 6 is logged as the mean of 5 and 6
        assert rest.losses[iteration] == whole.losses[iteration]


@pytest.mark.checkout
@pytest.mark.parametrize("door", ["autoload", "module"])
def test_the_unmodified_script_of_a_checkout_trains(door, train, infir2_run):
    """Megatron-LM's own pretrain_gpt.py; core_v0.14.0 is the reference's."""
    checkout = megatron_lm()
    script = str(checkout / "pretrain_gpt.py")
    program = ("-m", "megatron_fp8_ext", script) if door == "module" else (script,)
    # The checkout compiles its dataset helpers with the python3 and python3-config of PATH.
    places = f"{os.path.dirname(sys.executable)}:{sys.base_prefix}/bin:{os.environ['PATH']}"
    outcome = train(
        *INFIR2, script=program, launcher=True, PYTHONPATH=f"{checkout}:{ROOT}", PATH=places
    )
    assert outcome.casts == infir2_run.casts
    assert outcome.losses[8] < outcome.losses[1]
