"""Run the CUDA C++ kernels on the CPU, thread by thread, to test what they compute without a GPU.

The source is compiled by g++ against cuda_on_cpu.hpp; the few PTX instructions are replaced by their meaning.
What this cannot show: that NVRTC's compiler and the GPU agree (tests/gpu/test_hopper.py does), races, speed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMPILER = shutil.which("g++")
# PTX by its first words: the operands as the source writes them, `out` first.
PTX = {
    "cvt.rn.bf16x2.f32": "{0} = bf16x2({1}, {2});",
    "max.bf16x2": "{0} = larger_halves({1}, {2}, false);",
    "max.NaN.bf16x2": "{0} = larger_halves({1}, {2}, true);",
    "cvt.rn.satfinite.e4m3x2.f32": "{0} = e4m3x2({1}, {2});",
    "rcp.approx.ftz.f32": "{0} = rcp_ftz({1});",
    "ex2.approx.ftz.f32": "{0} = exp2_ftz({1});",
    "cp.async.cg.shared.global": "memcpy(to, from, {bytes});",
    "cp.async.ca.shared.global": "memcpy(to, from, {bytes});",
    "cp.async.commit_group": "",
    "cp.async.wait_group": "",
    "": "",
}
LAUNCH = """
static Arguments given;
static void begin() { ENTRY(given); ended[running] = true; while (true) yield(); }

extern "C" void launch(const Arguments *arguments, int grid_x, int grid_y, int threads) {
  static std::vector<char> stacks(MAX_THREADS * 65536);
  given = *arguments;
  blockDim = {(unsigned)threads, 1, 1};
  gridDim = {(unsigned)grid_x, (unsigned)grid_y, 1};
  for (int y = 0; y < grid_y; y++)
    for (int x = 0; x < grid_x; x++) {
      blockIdx = {(unsigned)x, (unsigned)y, 0};
      for (int t = 0; t < threads; t++) {
        indices[t] = {(unsigned)t, 0, 0};
        ended[t] = false;
        getcontext(&fibers[t]);
        fibers[t].uc_stack.ss_sp = stacks.data() + t * 65536;
        fibers[t].uc_stack.ss_size = 65536;
        fibers[t].uc_link = &scheduler;
        makecontext(&fibers[t], begin, 0);
      }
      for (int left = threads; left > 0;) {
        left = 0;
        for (running = 0; running < threads; running++)
          if (!ended[running]) { swapcontext(&scheduler, &fibers[running]); left += !ended[running]; }
      }
    }
}
"""


def _meaning(match: re.Match[str]) -> str:
    instruction = match[1].split(" ")[0].rstrip(";")
    operands = [
        text.strip() for text in re.findall(r'"=?[rhfl]"\(((?:[^()]|\([^()]*\))*)\)', match[2])
    ]
    return PTX[instruction].format(*operands, bytes=match[1].rstrip(";").split(" ")[-1])


def without_ptx(text: str) -> str:
    """Return C++ with the meaning of each asm statement in its place.

    Raises:
        KeyError: an instruction whose meaning is not written down.
    """
    text = re.sub(
        r'asm(?: volatile)?\("([^"]*)"((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\);', _meaning, text
    )
    assert "asm" not in text.replace("volatile", ""), "an asm statement was not understood"
    return text


def translated(file: str, macros: tuple[tuple[str, int], ...], entry: str) -> str:
    """Return C++ of one kernel with its `launch`.

    Raises:
        KeyError: an instruction whose meaning is not written down.
    """
    folder = resources.files("megatron_fp8_ext.kernels")
    text = "".join(folder.joinpath(name).read_text("utf-8") for name in ("hopper.cuh", file))
    text = without_ptx(text).replace(
        "extern __shared__ uint4 staged[];", "static uint4 staged[1 << 14];"
    )
    text = text.replace("__shared__", "static")
    defined = "".join(f"#define {name} {value}\n" for name, value in macros)
    shim = (HERE / "cuda_on_cpu.hpp").read_text("utf-8")
    return f"{shim}\n{defined}\n{text}\n#define ENTRY {entry}\n{LAUNCH}"


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="cuda-on-cpu-"))


@functools.cache
def library(source: str) -> ctypes.CDLL:
    """Compile C++ and load it, once a process."""
    name = hashlib.sha256(source.encode()).hexdigest()[:16]
    file, built = _folder() / f"{name}.cpp", _folder() / f"{name}.so"
    file.write_text(source)
    flags = [
        "-O1",
        "-std=c++17",
        "-fno-strict-aliasing",
        "-ffp-contract=off",
        "-fPIC",
        "-shared",
        "-w",
        "-Wno-psabi",
    ]
    subprocess.run([str(COMPILER), *flags, str(file), "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


class Kernel:
    """As `nvrtc.Kernel`, on the CPU."""

    def __init__(self, file: str, macros: tuple[tuple[str, int], ...], entry: str) -> None:
        self._library = library(translated(file, macros, entry))

    def __call__(self, grid: tuple[int, int], threads: int, arguments: ctypes.Structure) -> None:
        self._library.launch(ctypes.byref(arguments), grid[0], grid[1], threads)
