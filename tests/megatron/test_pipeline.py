"""docs/pipeline.md, command by command: SmolLM2's released weights to an evaluated FP8 checkpoint.

Three tests, in the page's order. RL is slime's own loop on a Ray cluster of this machine: it needs SLIME_PATH
(a checkout of v0.3) and MEGATRON_FP8_SLIME_PYTHON (see tests/ray_cluster.py). The evaluation of its result
needs MEGATRON_FP8_EVALSCOPE and MEGATRON_FP8_SERVER_PYTHON as well (see tests/evaluation). All of it: ten
minutes of two busy cores, and 6 GB.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray_cluster
import trees
from conftest import ROOT, free_port

from megatron_fp8_ext.demo import text
from megatron_fp8_ext.slime_plugin import checkout

pytestmark = [pytest.mark.megatron, pytest.mark.slow, pytest.mark.timeout(2400)]
PAGE = (ROOT / "docs" / "pipeline.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("megatron-fp8 ")
]
FIRST_RL = next(number for number, line in enumerate(COMMANDS) if "-rl-" in line)
ALL = "tensor-model-parallel-size=1 lr=1e-5 min-lr=1e-6 save-interval=1000".split()
# What makes each stage small; everything else is the page's, and so the preset's.
SMALL = {
    "cpt": "global-batch-size=2 seq-length=128 train-iters=3 lr-warmup-iters=1 lr-wsd-decay-iters=1 "
    "eval-iters=0 eval-interval=1000 split=100,0,0 num-workers=0",
    "sft": "global-batch-size=4 seq-length=256 train-samples=8",
    # The preset's reward wants thoughts and a boxed number; f1, slime's too, is the overlap of words.
    "rl": "context-parallel-size=1 rollout-num-gpus-per-engine=1 lr=5e-5 colocate=false rm-type=f1 "
    "num-rollout=1 save-interval=1 rollout-batch-size=2 over-sampling-batch-size=2 "
    "n-samples-per-prompt=4 global-batch-size=8 rollout-max-response-len=16 max-tokens-per-gpu=1024",
}
ON_THE_CPU = (
    "--no-save-optim --fp8-emulate --spec rl_loop.layers spec --sglang-router-port {port} "
    "--rollout-external-engine-addrs 127.0.0.1:{port} --sglang-router-ip 127.0.0.1 --update-weight-mode full "
    "--update-weight-transport disk --update-weight-disk-dir push --sglang-enable-deterministic-inference "
    "--max-train-rollout-diff {limit}"
)
# Mean difference of log-probabilities. SmolLM2 is touchy: on answers of its own one FP8 model with BF16 and
# with FP32 between its layers is 0.10 apart (0.03 without FP8). A server that kept its random weights is
# far off (tests/slime/test_rl_loop.py).
LIMIT = 0.5
LOOP = ROOT / "tests" / "slime"
QUESTIONS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the capital of Italy?": "The capital of Italy is Rome.",
    "What color is the sky?": "The sky is blue.",
    "How many days are in a week?": "There are seven days in a week.",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with everything that the page takes for granted, but slime and the Ray cluster."""
    folder = tmp_path_factory.mktemp("pipeline")
    from pydoc_data import topics

    with (folder / "corpus.jsonl").open("w") as file:
        for _, page in sorted(topics.topics.items())[:40]:
            file.write(json.dumps({"text": page}) + "\n")
    for stage, terms in (("stage1", 2), ("stage2", 3)):
        with (folder / f"{stage}.jsonl").open("w") as file:
            for start in range(24):
                numbers = [start + 2 * k for k in range(terms)]
                answer = f"<think>{' + '.join(map(str, numbers))}</think>{sum(numbers)}"
                question = f"What is {' + '.join(map(str, numbers))}?"
                turns = [("user", question), ("assistant", answer)]
                messages = [{"role": role, "content": content} for role, content in turns]
                file.write(json.dumps({"messages": messages}) + "\n")
    with (folder / "dapo-math-17k.jsonl").open("w") as file:
        for question, answer in QUESTIONS.items():
            file.write(json.dumps({"prompt": question, "label": answer}) + "\n")
    (folder / "questions").mkdir()
    rows = [{"problem": "What is 2 + 3?", "answer": 5}, {"problem": "What is 7 + 1?", "answer": 8}]
    (folder / "questions" / "aime24.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    make = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import torch, transformers, make_models\n"
        "from megatron_fp8_ext.checkpoint import gguf\n"
        "gguf.gguf_to_hf(Path(sys.argv[2]), Path('released'))\n"
        "llama = transformers.AutoModelForCausalLM.from_pretrained('released', dtype=torch.bfloat16)\n"
        "make_models.as_qwen2(llama, make_models.WHOLE_BLOCKS).save_pretrained('MODEL')\n"
        "transformers.AutoTokenizer.from_pretrained('released').save_pretrained('MODEL')\n"
    )
    words = [
        sys.executable,
        "-c",
        make,
        str(ROOT / "tests" / "evaluation"),
        str(text.tokenizer_file()),
    ]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.rmtree(folder / "released")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cluster(place) -> Iterator[tuple[str, int]]:
    """A Ray cluster (dashboard), and the port where the rollout server is to listen.

    slime gets an accelerator called `cpu` in the nodes' environment (tests/slime/rl_loop/on_cpu).
    """
    ray_cluster.python()
    slime = next((tree for tree in trees.found() if checkout.read(tree, "").per_step_batch), None)
    if slime is None:
        pytest.skip("needs a checkout of slime v0.3 in SLIME_PATH")
    (place / "slime").symlink_to(slime)
    port = free_port()
    path = os.pathsep.join(map(str, (LOOP / "rl_loop" / "on_cpu", ROOT, LOOP)))
    node = {"PYTHONPATH": path, "SLIME_ACCELERATOR": "cpu", "SLIME_HOST_IP": "127.0.0.1"}
    with ray_cluster.started(place, [node]) as dashboard:
        yield dashboard, port


@contextlib.contextmanager
def serving(place: Path, port: int) -> Iterator[None]:
    """The rollout server of one RL stage: it starts with random weights and gets its own by a push."""
    script = Path(__file__).with_name("text_server.py")
    env = ray_cluster.environment(PYTHONPATH=os.pathsep.join((str(ROOT), str(LOOP))))
    with (place / "server.log").open("ab") as log:
        words = [ray_cluster.python(), "-W", "ignore", str(script), "exp/sft-fp8"]
        words += ["--port", str(port)]
        server = subprocess.Popen(words, cwd=place, env=env, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and server.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            time.sleep(0.5)
        yield
    finally:
        server.kill()
        server.wait()


def environment() -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NVTE_", "MEGATRON_FP8_EXT"))}
    return {**clean, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def smaller(words: list[str], cluster: tuple[str, int] | None) -> list[str]:
    """The page's command, at the size of a test."""
    if words[:2] == ["data", "pack"]:
        words[words.index("--seq-length") + 1] = "256"
    if words[0] == "run":
        stage = next(stage for stage in SMALL if f"-{stage}" in words[1])
        settings = [token for text in (*ALL, *SMALL[stage].split()) for token in ("--set", text)]
        words += [*settings, "--nodes", "1", "--gpus", "1"]
        if stage != "rl":  # checkpoints of the weights alone: 0.4 GB instead of 2.7
            return [*words, "--", "--no-save-optim", "--no-save-rng"]
        assert cluster is not None
        dashboard, port = cluster
        words[words.index("--ray-address") + 1] = dashboard
        words += ["--", *ON_THE_CPU.format(port=port, limit=LIMIT).split()]
    if words[0] == "eval":
        words += ["--server", "transformers", "--server-args", "--device cpu", "--samples", "2"]
        words += ["--max-tokens", "24", "--batch", "1", "--server-python"]
        words += [os.environ["MEGATRON_FP8_SERVER_PYTHON"]]
    return words


def walk(place: Path, line: str, cluster: tuple[str, int] | None = None) -> str:
    name, *words = shlex.split(line)
    assert name == "megatron-fp8"
    argv = [sys.executable, "-W", "ignore", "-m", "megatron_fp8_ext.cli", *smaller(words, cluster)]
    beside, env = contextlib.nullcontext(), environment()
    if cluster is not None and "-rl-" in line:  # `ray` is the one of slime's Python
        beside, env = serving(place, cluster[1]), ray_cluster.environment()
    start = time.monotonic()
    with beside:
        done = subprocess.run(
            argv, cwd=place, capture_output=True, text=True, errors="replace", env=env
        )
    print(f"{time.monotonic() - start:4.0f} s  {line}", flush=True)
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def test_released_weights_to_the_fp8_model_that_rl_serves(place):
    said = {line: walk(place, line) for line in COMMANDS[:FIRST_RL]}
    runs = [(line, name) for line, name in _runs() if "-rl-" not in line]
    assert len(runs) == 3
    for line, name in runs:
        _recorded(place, name)
        assert "emulated casts on rank 0" in said[line], "trained in FP8"
        assert re.search(r"iteration\s+2/", said[line])
    released, sft = _weights(place / "MODEL"), _weights(place / "exp" / "sft")
    assert sft.shape == released.shape and not sft.equal(released), "it has learnt something"


def test_two_stages_of_rl_to_fp8(place, cluster):
    if not (place / "exp" / "sft-fp8").is_dir():
        pytest.skip("needs the test above")
    before = _trained(place, "InfiR2_SFT_FP8_7B_stage2")
    for line in COMMANDS[FIRST_RL:]:
        if " eval " in line:
            continue
        log = walk(place, line, cluster)
        if "-rl-" not in line:
            continue
        name = dict(_runs())[line]
        _recorded(place, name)
        assert "doctor --every-node" in log and re.search(r"^ok   .*1 GPU", log, re.MULTILINE), log
        assert "slime actor: recipe infir2-rl" in log and "EMULATED" in log
        # slime's own lines of the rollout and of the step.
        assert re.search(r"rollout 0: \{'rollout/", log), log[-3000:]
        norm = re.search(r"step 0: \{'train/loss.*'train/grad_norm': ([\d.e+-]+)", log)
        assert norm is not None and float(norm[1]) > 0
        # The server computed with the weights that were pushed, in training's own scale format.
        apart = re.search(
            r"rollout 0: train/rollout KL \S+, log-probability difference mean (\S+)", log
        )
        assert apart is not None and float(apart[1]) < LIMIT
        after = _trained(place, name)
        assert after.shape == before.shape and not after.equal(before), f"{name} changed nothing"
        before = after
    sft, final = _weights(place / "exp" / "sft"), _weights(place / "exp" / "final")
    assert not final.equal(sft), "RL's weights, not SFT's"
    config = json.loads((place / "exp" / "final-fp8" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]


def test_the_fp8_model_is_evaluated(place):
    if not (place / "exp" / "final-fp8").is_dir():
        pytest.skip("needs the test above")
    for name in ("MEGATRON_FP8_EVALSCOPE", "MEGATRON_FP8_SERVER_PYTHON"):
        if name not in os.environ:
            pytest.skip(f"needs {name} (tests/evaluation/test_end_to_end.py)")
    (line,) = [line for line in COMMANDS if " eval " in line]
    walk(place, line)
    found = json.loads((place / "runs" / "eval" / "final-fp8" / "results.json").read_text())
    score = found["benchmarks"]["aime24"]
    assert (score["questions"], score["samples"]) == (2, 2) and 0 <= score["average"] <= 100


def _recorded(place: Path, name: str) -> None:
    """The run's record says where its checkpoints are, for the next stage."""
    record = json.loads((place / "exp" / name / "run.json").read_text())
    assert record["save"] == f"exp/{name}/checkpoints" and (place / record["save"]).is_dir()


def _runs() -> list[tuple[str, str]]:
    from megatron_fp8_ext import presets

    lines = [line for line in COMMANDS if " run " in line]
    return [(line, presets.get(shlex.split(line)[2]).experiment) for line in lines]


def _weights(folder: Path) -> Any:
    """One matrix of the model."""
    from safetensors import safe_open

    with safe_open(next(folder.glob("*.safetensors")), "pt") as opened:
        return opened.get_tensor("model.layers.3.mlp.up_proj.weight")


def _trained(place: Path, name: str) -> Any:
    """One matrix of a run's last checkpoint."""
    from megatron_fp8_ext.checkpoint.torch_dist import TorchDist

    last = max((place / "exp" / name / "checkpoints").glob("iter_*"))
    return TorchDist(last).read("decoder.layers.mlp.linear_fc1.weight", layer=3)
