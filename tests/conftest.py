"""Shared fixtures. Real Megatron, real text; every training run is a subprocess, as a user starts it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_fp8_ext import training_log
from megatron_fp8_ext.megatron_plugin import arguments
from megatron_fp8_ext.training_log import Iteration

if not Path("/dev/nvidiactl").exists():
    # Before any test imports Triton: without a GPU its kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
ENTRY = ROOT / "entrypoints" / "pretrain_gpt.py"
EXAMPLE_PACKAGE = ROOT / "tests" / "example_package"

# Qwen2.5-shaped, tiny; the vocabulary is bytes, so that real text needs no tokenizer (512: the same
# padded size for TP=1 and TP=2).
MODEL = (
    "--num-layers 2 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2 --add-qkv-bias --disable-bias-linear --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --attention-dropout 0 "
    "--hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size 512 "
    "--seq-length 128 --max-position-embeddings 128"
).split()
TRAINING = (
    "--bf16 --micro-batch-size 2 --global-batch-size 4 --train-iters 8 --lr 1e-3 --min-lr 1e-5 "
    "--lr-decay-style WSD --lr-wsd-decay-style cosine --lr-wsd-decay-iters 4 --lr-warmup-iters 2 "
    "--split 98,2,0 --eval-iters 0 --eval-interval 1000000 --log-interval 1 --save-interval 1000 "
    "--seed 1236"
).split()
# Flags of TRAINING that a schedule of ours replaces.
NATIVE_SCHEDULE = tuple(
    "--train-iters --lr --min-lr --lr-decay-style --lr-wsd-decay-style --lr-wsd-decay-iters "
    "--lr-warmup-iters".split()
)


@dataclass(frozen=True)
class Outcome:
    """What a training command printed."""

    code: int
    output: str
    iterations: list[Iteration]

    @property
    def losses(self) -> dict[int, float | None]:
        return {i.number: i.loss for i in self.iterations}

    @property
    def casts(self) -> dict[str, int]:
        """Emulated casts of rank 0, by operand."""
        line = re.search(r"emulated casts on rank 0: (.*)", self.output)
        found = re.findall(r"([a-z ]+?) (\d+)(?:, |$)", line.group(1)) if line else []
        return {name: int(count) for name, count in found}

    @property
    def said(self) -> list[str]:
        """Our own lines."""
        return [x for x in self.output.splitlines() if x.startswith("megatron_fp8_ext:")]


def free_port() -> int:
    """Return a free port below those that the system gives to clients, who may take one at any time."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run(
    argv: list[str],
    timeout: int = 400,
    kill: Callable[[subprocess.Popen[str]], None] | None = None,
    **env: str,
) -> Outcome:
    """Run a command with a clean environment of our variables, and parse its log.

    `kill` runs in a thread meanwhile, and may end the process (and its group).
    """
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("MEGATRON_FP8", "NVTE_", "TRITON_"))
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        clean.pop(name, None)
    path = os.pathsep.join(filter(None, (str(ROOT), clean.get("PYTHONPATH"))))
    clean |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env}
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", env=clean,
        cwd="/", start_new_session=True,
    )  # fmt: skip
    if kill is not None:
        threading.Thread(target=kill, args=(process,), daemon=True).start()
    try:
        printed, errors = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    parsed = list(training_log.parse(printed.splitlines()))
    return Outcome(process.returncode, printed + errors, parsed)


def _need_megatron() -> None:
    if not importlib.util.find_spec("torch") or not importlib.util.find_spec("megatron"):
        pytest.skip("needs torch and megatron-core")


def megatron_wheel(version: str) -> Path:
    """Folder with the `megatron` package of a megatron-core wheel, kept in .cache between runs."""
    _need_megatron()
    folder = ROOT / ".cache" / f"megatron-core-{version}"
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(partial)]
        done = subprocess.run([*pip, f"megatron-core=={version}"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"megatron-core {version} cannot be had here: {done.stderr[-200:]}")
        partial.rename(folder)
    return folder


def megatron_lm() -> Path:
    """A Megatron-LM checkout; skips the test where there is none."""
    for place in (os.environ.get("MEGATRON_LM_PATH"), str(ROOT / "third_party" / "Megatron-LM")):
        if place and (Path(place) / "megatron" / "training" / "arguments.py").is_file():
            for needed in ("six", "regex", "pybind11"):
                pytest.importorskip(needed, reason=f"core_v0.14.0 needs `pip install {needed}`")
            return Path(place)
    pytest.skip("needs a Megatron-LM checkout: MEGATRON_LM_PATH or third_party/Megatron-LM")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CPython's help texts as a Megatron corpus of bytes."""
    _need_megatron()
    prefix = tmp_path_factory.mktemp("corpus") / "text"
    code = (
        "import torch; from pydoc_data import topics\n"
        "from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder as B\n"
        f"import numpy; b = B({str(prefix) + '.bin'!r}, dtype=numpy.uint16)\n"
        "for _, t in sorted(topics.topics.items()):\n"
        "    x = torch.tensor([*t.encode(), 256]); b.add_document(x, [len(x)])\n"
        f"b.finalize({str(prefix) + '.idx'!r})"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)
    return prefix


@pytest.fixture(scope="session")
def small_corpora(tmp_path_factory):
    """Two corpora of 804 and 500 tokens in documents of uneven length: 50 and 31 samples."""
    _need_megatron()
    folder = tmp_path_factory.mktemp("small")
    code = (
        "import torch, numpy; from pydoc_data import topics\n"
        "from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder as B\n"
        "text = ''.join(t for _, t in sorted(topics.topics.items())).encode()\n"
        "for name, sizes in (('a', [37, 61, 5, 80, 44, 120, 18, 90, 33, 71, 150, 9, 86]),\n"
        "                    ('b', [100, 43, 12, 77, 140, 29, 66, 33])):\n"
        f"    prefix = {str(folder)!r} + '/' + name\n"
        "    b = B(prefix + '.bin', dtype=numpy.uint16); at = 0\n"
        "    for size in sizes:\n"
        "        b.add_document(torch.tensor([*text[at:at + size - 1], 256]), [size]); at += size\n"
        "    b.finalize(prefix + '.idx')\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def train(corpus: Path):
    """Train the tiny model; extra flags are appended, so they win over the defaults."""

    def start(
        *flags: str,
        processes: int = 1,
        script: Path | tuple[str, ...] = ENTRY,
        ok: bool = True,
        launcher: bool = False,
        drop: dict[str, bool] | None = None,  # flag of MODEL -> whether it takes a value
        without: tuple[str, ...] = (),  # flags of TRAINING that take a value
        kill: Callable[[subprocess.Popen[str]], None] | None = None,
        **env: str,
    ):
        data = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]
        python = [sys.executable]
        if processes > 1 or launcher:
            python += [
                "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
                "--master-port", str(free_port()),
            ]  # fmt: skip
        model, training = MODEL, TRAINING
        for flag, takes_value in (drop or {}).items():
            model = arguments.without(model, flag, takes_value)
        for flag in without:
            training = arguments.without(training, flag, takes_value=True)
        program = script if isinstance(script, tuple) else (str(script),)
        outcome = run([*python, *program, *model, *training, *data, *flags], kill=kill, **env)
        if ok:
            assert outcome.code == 0, outcome.output[-6000:]
        return outcome

    return start


@pytest.fixture(scope="session")
def infir2_run(train):
    """One emulated run without any extra flag; several tests look at it."""
    return train("--use-distributed-optimizer", "--fp8-recipe", "infir2")


@pytest.fixture(scope="session")
def bf16_run(train):
    return train("--use-distributed-optimizer", "--fp8-recipe", "bf16")


@pytest.fixture(params=["0.17.0", "0.18.0", "0.19.2"])
def wheel(request):
    """(version, folder) of each supported megatron-core wheel."""
    return request.param, megatron_wheel(request.param)


SFT = (
    "--seq-length 256 --max-position-embeddings 512 --micro-batch-size 1 --global-batch-size 8 "
    "--train-iters 6 --lr-decay-style constant"
).split()


def without_defaults(flags: list[str]) -> list[str]:
    """TRAINING of conftest without BF16 (exact comparisons) and without a WSD schedule."""
    kept, skip = [], 0
    takes = ("--lr-decay-style", "--lr-wsd-decay-style", "--lr-wsd-decay-iters", "--lr-warmup-iters",
             "--micro-batch-size", "--global-batch-size", "--train-iters", "--split", "--eval-iters",
             "--eval-interval")  # fmt: skip
    for token in flags:
        if skip:
            skip -= 1
        elif token in takes:
            skip = 1
        elif token != "--bf16":
            kept.append(token)
    return kept


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """40 short reasoning samples in a byte tokenizer's tokens."""
    from chat import write_tokenizer

    from megatron_fp8_ext.sft import pack_job, template

    folder = tmp_path_factory.mktemp("sft")
    chat = template.load(write_tokenizer(folder / "tokenizer"))
    draw = random.Random(0)
    with (folder / "a.jsonl").open("w") as file:
        for _ in range(40):
            a, n = draw.randrange(90), draw.choice([1, 2, 5, 9, 30])
            steps = " ".join(str(a + k) for k in range(n))
            answer = f"<think>\n{steps}\n</think>\n{a + n}"
            file.write(json.dumps({"prompt": f"{a}+{n}?", "response": answer}) + "\n")
    pack_job.pack([folder / "a.jsonl"], chat, folder / "out", pack_job.Options(seq_length=256))
    return folder / "out"


@pytest.fixture(scope="session")
def sft(packed):
    """Start a run on packed samples; extra flags are appended."""

    def start(*flags, processes=1, ok=True, data=None, base=SFT):
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes),
                         "--master-port", str(free_port())]  # fmt: skip
        assert MODEL[-4:] == ["--seq-length", "128", "--max-position-embeddings", "128"]
        model = MODEL[:-4]
        own = ["--sft-data", str(data or packed)]
        outcome = run(
            [*launcher, str(ENTRY), *model, *without_defaults(TRAINING), *base, *own, *flags]
        )
        if ok:
            assert outcome.code == 0, outcome.output[-6000:]
        return outcome

    return start
