"""docker/Dockerfile by the rules that matter here; no container engine is needed."""

from __future__ import annotations

import re
import subprocess

import pytest
from conftest import ROOT
from dev_tools import tool

TEXT = (ROOT / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
LINES = [line for line in TEXT.splitlines() if line and not line.startswith("#")]


def test_the_linter_has_nothing_to_say():
    done = subprocess.run(
        [tool("hadolint"), "--failure-threshold", "style", str(ROOT / "docker" / "Dockerfile")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize(
    "line", ["FROM ubuntu:latest", "FROM ubuntu:24.04\nRUN apt-get install git"]
)
def test_the_linter_finds_a_moving_tag(line, tmp_path):
    (tmp_path / "Dockerfile").write_text(line + "\n")
    done = subprocess.run(
        [tool("hadolint"), str(tmp_path / "Dockerfile")], capture_output=True, text=True
    )
    assert done.returncode == 1 and "DL300" in done.stdout


def test_nothing_moves():
    (base,) = [line.split()[1] for line in LINES if line.startswith("FROM ")]
    assert re.search(r":\d+\.\d+\.\d+", base) and "latest" not in TEXT
    for line in LINES:
        for command in re.findall(r"pip install ([^&]*)", line):
            words = re.sub(r"--index-url \S+|--\S+|\"", "", command).split()
            assert all("==" in word or word == "." for word in words), command
        assert "git+" not in line and "git clone" not in line


def test_it_does_not_run_as_root_and_copies_what_exists():
    assert LINES[-1].startswith("CMD [") and "USER 10001" in LINES
    for line in LINES:
        if line.startswith("COPY "):
            assert all((ROOT / source).exists() for source in line.split()[1:-1])
        assert line.split()[0].isupper() or line.startswith((" ", "    ")), line
    assert "apt-get install --yes --no-install-recommends" in TEXT
    assert "rm -rf /var/lib/apt/lists" in TEXT
