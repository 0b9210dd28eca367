"""The wheel goes into an existing environment without moving anything in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def find_python(version: str) -> str | None:
    """A Python of that version: on PATH or under pyenv, and able to run."""
    places = [shutil.which(f"python{version}")]
    if sys.version.startswith(f"{version}."):
        places.append(sys.executable)
    places += map(str, sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python3")))
    for place in filter(None, places):
        code = f"import sys, venv; sys.exit(sys.version[:{len(version)}] != '{version}')"
        if subprocess.run([place, "-c", code], capture_output=True).returncode == 0:
            return place
    return None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


@pytest.mark.parametrize(("python", "numpy"), [("3.10", "1.26"), ("3.12", "2")])
def test_nothing_installed_is_moved(wheel, tmp_path, python, numpy):
    interpreter = find_python(python)
    if interpreter is None:
        pytest.skip(f"needs a Python {python}")
    subprocess.run([interpreter, "-m", "venv", str(tmp_path / "env")], check=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def pip(*words: str) -> str:
        command = [str(tmp_path / "env" / "bin" / "python"), "-m", "pip", "-q", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    pip("install", f"numpy=={numpy}.*", "packaging")
    before = set(pip("freeze").splitlines())
    pip("install", str(wheel))
    after = set(pip("freeze").splitlines())
    assert before <= after, f"moved: {before - after}"
    names = {line.split("==")[0].split("@")[0].strip().lower() for line in after - before}
    heavy = {"torch", "numpy", "transformer-engine", "megatron-core"}
    assert not names & heavy, names
    assert len(names) < 20, names
    script = str(tmp_path / "env" / "bin" / "megatron-fp8")
    shown = subprocess.run([script, "show", "infir2"], capture_output=True, text=True, env=env)
    assert shown.returncode == 0 and "128x128" in shown.stdout
    if python == "3.10":  # megatron-core's wheel wants 3.12
        (tmp_path / "torch.py").touch()
        entry = [
            str(tmp_path / "env" / "bin" / "python"),
            str(ROOT / "entrypoints/pretrain_gpt.py"),
        ]
        told = subprocess.run(
            [*entry, "--fp8-recipe", "infir2"],
            capture_output=True,
            text=True,
            env={**env, "PYTHONPATH": str(tmp_path)},
        )
        assert told.returncode == 2 and "needs Python 3.12 (this is 3.10)" in told.stderr
    # No torch and no Megatron here: doctor says so, with a mend, and exits 1.
    doctor = subprocess.run([script, "doctor"], capture_output=True, text=True, env=env)
    assert doctor.returncode == 1 and "pip install torch" in doctor.stdout


def test_setup_says_which_python_it_needs(tmp_path):
    wrong = find_python("3.10")
    if wrong is None:
        pytest.skip("needs a Python 3.10 to refuse")
    setup = ["sh", str(ROOT / "tools" / "setup.sh"), str(tmp_path / "env")]
    done = subprocess.run(
        setup, capture_output=True, text=True, env={**os.environ, "PYTHON": wrong}
    )
    assert done.returncode == 2 and f"PYTHON={wrong} is not a Python 3.12 or 3.13" in done.stderr
    nothing = {"PATH": "/nowhere", "HOME": str(tmp_path)}
    done = subprocess.run(["/bin/sh", *setup[1:]], capture_output=True, text=True, env=nothing)
    assert done.returncode == 2 and "no Python 3.12 or 3.13 found" in done.stderr
    assert not (tmp_path / "env").exists()
