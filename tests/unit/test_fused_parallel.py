"""Tensor and sequence parallelism of the fused functions, on two ranks over gloo."""

from __future__ import annotations

import os
import sys

import pytest
from conftest import ROOT, free_port, run

pytest.importorskip("torch")
pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["tensor", "sequence"])
def test_two_ranks_compute_what_one_does(mode):
    path = os.pathsep.join(str(ROOT / part) for part in (".", "tests"))
    argv = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--master-port", str(free_port()), str(ROOT / "tests" / "fused_parallel.py"), mode,
    ]  # fmt: skip
    done = run(argv, TRITON_INTERPRET="1", PYTHONPATH=path)
    assert done.code == 0, done.output[-4000:]
    assert done.output.count("ok ") == 13, done.output
