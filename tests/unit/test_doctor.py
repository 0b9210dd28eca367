from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fp8_ext import doctor
from megatron_fp8_ext.megatron_plugin import compat

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(
    ("engine", "capability", "cuda", "words"),
    [
        ("2.20.2", (9, 0), (12, 9), None),
        ("2.20.2", (9, 0), (13, 0), None),
        ("2.20.2", (10, 0), (13, 0), None),
        ("2.20.2", (8, 0), (13, 0), "compute capability 8.0"),
        ("2.20.2", (9, 0), (12, 6), "CUDA 12.6, and block scaling needs 12.9"),
        (None, (9, 0), (12, 9), "TransformerEngine is not installed"),
        ("2.2.1", (9, 0), (12, 9), "TransformerEngine 2.2.1 has no block scaling"),
        ("2.20.2", None, None, "no GPU"),
    ],
)
def test_fp8_gap(engine, capability, cuda, words):
    gap = compat.fp8_gap(engine, capability, cuda)
    assert gap is None if words is None else words in gap


def package(tmp_path, name, *folders):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    for folder in folders:
        (tmp_path / name / folder).mkdir()


@pytest.mark.parametrize("name", ["slime", "apex"])
def test_namesakes_on_pypi_fail_with_a_mend(tmp_path, monkeypatch, name):
    package(tmp_path, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = [f for f in doctor._name_conflicts() if f.subject == name]
    assert finding.level == "fail" and f"pip uninstall {name}" in finding.mend


def test_the_real_ones_are_fine(tmp_path, monkeypatch):
    package(tmp_path, "slime", "backends")
    package(tmp_path, "apex", "optimizers")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [f.level for f in doctor._name_conflicts()] == ["ok", "ok"]


def test_a_checkout_in_the_working_directory_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "slime").mkdir()  # `git clone .../slime`, whose package is slime/slime
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = [f for f in doctor._name_conflicts() if f.subject == "slime"]
    assert finding.level == "ok" and "not installed" in finding.found


@pytest.mark.parametrize(
    ("name", "value"),
    [("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1"), ("NVTE_BACKWARD_OVERRIDE", "dequantized")],
)
def test_te_variables_that_change_the_recipe_fail(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    (finding,) = [f for f in doctor._environment() if f.subject == name]
    assert finding.level == "fail" and "unset it" in finding.mend


def test_missing_torch_fails(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    findings = doctor.examine()
    failed = {f.subject for f in findings if f.level == "fail"}
    assert {"torch", "Megatron"} <= failed
    assert all(f.mend for f in findings if f.level == "fail")


@pytest.mark.parametrize(
    ("words", "level"),
    [
        (["--host=127.0.0.1"], "ok"),
        ([], "ok"),
        (["--host=0.0.0.0"], "fail"),
        (["--host=::"], "fail"),
    ],
)
def test_a_ray_dashboard_open_to_the_world_fails(words, level):
    from megatron_fp8_ext.slime_plugin.examine import dashboards

    line = ["python", "site-packages/ray/dashboard/dashboard.py", *words]
    (row,) = dashboards([["bash"], line])
    assert row[0] == level and row[1] == "Ray dashboard"


@pytest.mark.parametrize(
    ("per_step_batch", "version", "level", "found"),
    [
        (True, "0.5.15.post1", "ok", "0.5.15.post1"),
        (True, "0.5.19", "ok", "released with 0.5.15.post1"),
        (True, "0.5.23", "fail", "no dataclass since 0.5.20"),
        (True, "0.5.5.post3", "fail", "older than 0.5.6"),
        (False, "0.5.0rc0", "ok", "0.5.0rc0"),
        (False, "0.5.15.post1", "fail", "sglang_dp_size since 0.5.14"),
        (True, None, "fail", "not installed"),
    ],
)
def test_an_sglang_that_slime_cannot_use_fails(per_step_batch, version, level, found):
    from megatron_fp8_ext.slime_plugin import examine, sglang

    fits = sglang.of(per_step_batch)
    row = examine.engine(version, fits)
    assert row[0] == level and found in row[2]
    assert (row[3] == f"pip install sglang=={fits.released_with}") == (level == "fail")


def test_a_wheel_inside_a_git_repository_is_still_that_wheel():
    """From 0.19 on Megatron appends the commit of the repository that its files happen to lie in."""
    pytest.importorskip("megatron.core")
    version = compat.distribution_version("megatron-core")
    assert compat.megatron_is_wheel()
    assert compat.megatron_version() == version
    (finding,) = [f for f in doctor.examine() if f.subject == "Megatron"]
    assert finding.found == f"{version} (wheel)"


def test_a_checkout_keeps_its_commit(tmp_path):
    package = tmp_path / "megatron" / "core"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "package_info.py").write_text("__version__ = '0.19.2+abc1234'\n")
    code = (
        "from megatron_fp8_ext.megatron_plugin import compat; "
        "print(compat.megatron_version(), compat.megatron_is_wheel())"
    )
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.stdout.split() == ["0.19.2+abc1234", "False"], done.stderr


def test_the_source_s_digest_tells_two_checkouts_apart(tmp_path):
    root = Path(compat.__file__).parent.parent
    copy = tmp_path / "megatron_fp8_ext"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("__pycache__"))

    def digest():
        code = "from megatron_fp8_ext.megatron_plugin import compat; print(compat.source_digest())"
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    assert digest() == compat.source_digest()
    (copy / "notes.txt").write_text("no source")
    assert digest() == compat.source_digest()
    kernel = copy / "kernels" / "hopper.cuh"
    kernel.write_text(kernel.read_text() + "\n")
    assert digest() != compat.source_digest()
