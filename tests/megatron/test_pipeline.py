"""docs/pipeline.md, command by command: SmolLM2's released weights to an evaluated FP8 checkpoint.

About five minutes of one core and 3 GB. The evaluation needs MEGATRON_FP8_EVALSCOPE and
MEGATRON_FP8_SERVER_PYTHON (see tests/evaluation).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from megatron_fp8_ext.demo import text

pytestmark = [pytest.mark.megatron, pytest.mark.slow, pytest.mark.timeout(2400)]
PAGE = (ROOT / "docs" / "pipeline.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
ALL = "tensor-model-parallel-size=1 lr=1e-5 min-lr=1e-6 save-interval=1000".split()
# What makes each stage small; everything else is the page's, and so the preset's.
SMALL = {
    "cpt": "global-batch-size=2 seq-length=128 train-iters=3 lr-warmup-iters=1 lr-wsd-decay-iters=1 "
    "eval-iters=0 eval-interval=1000 split=100,0,0 num-workers=0",
    "sft": "global-batch-size=4 seq-length=256 train-samples=8",
    "rl": "context-parallel-size=1 rollout-num-gpus-per-engine=1 lr=1e-6",
}
# Plays the cluster: RL's weights go from --ref-load to --save as they are. Everything before and after
# it, and the command that it is given, is real.
RAY = """#!{python}
import json, shutil, sys
from pathlib import Path
words = sys.argv[1:]
assert words[:2] == ["job", "submit"], words
argv = words[words.index("--") + 1 :]
given = dict(zip(argv, argv[1:]))
with open("ray.jsonl", "a") as file:
    file.write(json.dumps(argv) + "\\n")
shutil.copytree(given["--ref-load"], given["--save"])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with everything that the page takes for granted, and `ray` on PATH."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "bin").mkdir()
    (folder / "bin" / "ray").write_text(RAY.format(python=sys.executable))
    (folder / "bin" / "ray").chmod(0o755)
    (folder / "slime").mkdir()
    (folder / "slime" / "train.py").write_text(
        "raise SystemExit('the stand-in for ray runs nothing')\n"
    )
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
    (folder / "dapo-math-17k.jsonl").write_text(json.dumps({"prompt": "1+1?", "label": "2"}) + "\n")
    (folder / "questions").mkdir()
    rows = [{"problem": "What is 2 + 3?", "answer": 5}, {"problem": "What is 7 + 1?", "answer": 8}]
    (folder / "questions" / "aime24.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    make = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import torch, transformers, make_models\n"
        "from megatron_fp8_ext.checkpoint import gguf\n"
        "gguf.gguf_to_hf(Path(sys.argv[2]), Path('released'))\n"
        "llama = transformers.AutoModelForCausalLM.from_pretrained('released', dtype=torch.bfloat16)\n"
        "make_models.as_qwen2(llama).save_pretrained('MODEL')\n"
        "transformers.AutoTokenizer.from_pretrained('released').save_pretrained('MODEL')\n"
    )
    words = [
        sys.executable,
        "-c",
        make,
        str(ROOT / "tests" / "evaluation"),
        str(text.tokenizer_file()),
    ]
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, env=environment(folder)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.rmtree(folder / "released")
    yield folder
    shutil.rmtree(folder)


def environment(folder: Path) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NVTE_", "MEGATRON_FP8_EXT"))}
    path = f"{folder / 'bin'}{os.pathsep}{clean['PATH']}"
    return {**clean, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def smaller(words: list[str]) -> list[str]:
    """The page's command, at the size of a test."""
    if words[:2] == ["data", "pack"]:
        words[words.index("--seq-length") + 1] = "256"
    if words[0] == "run":
        stage = next(stage for stage in SMALL if f"-{stage}" in words[1])
        settings = [token for text in (*ALL, *SMALL[stage].split()) for token in ("--set", text)]
        words += [*settings, "--nodes", "1", "--gpus", "1"]
        if stage != "rl":  # checkpoints of the weights alone: 0.4 GB instead of 2.7
            words += ["--", "--no-save-optim", "--no-save-rng"]
    if words[0] == "eval":
        words += ["--server", "transformers", "--server-args", "--device cpu", "--samples", "2"]
        words += ["--max-tokens", "24", "--batch", "1", "--server-python"]
        words += [os.environ["MEGATRON_FP8_SERVER_PYTHON"]]
    return words


def walk(place: Path, line: str) -> str:
    name, *words = shlex.split(line)
    assert name == "megatron-fp8"
    argv = [sys.executable, "-W", "ignore", "-m", "megatron_fp8_ext.cli", *smaller(words)]
    done = subprocess.run(argv, cwd=place, capture_output=True, text=True, env=environment(place))
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def test_the_page_from_released_weights_to_fp8(place):
    said = {line: walk(place, line) for line in COMMANDS if " eval " not in line}
    trained = [name for line, name in _runs() if "-rl-" not in line]
    assert len(trained) == 3
    for line, name in _runs():
        checkpoints = place / "exp" / name / "checkpoints"
        record = json.loads((place / "exp" / name / "run.json").read_text())
        assert record["save"] == f"exp/{name}/checkpoints" and checkpoints.is_dir(), line
        if name in trained:
            assert "emulated casts on rank 0" in said[line], "trained in FP8"
            assert re.search(r"iteration\s+2/", said[line])
    first, second = [json.loads(line) for line in (place / "ray.jsonl").read_text().splitlines()]
    for argv, before in ((first, "SFT_FP8_7B_stage2"), (second, "RL_FP8_7B_stage1")):
        given = dict(itertools.pairwise(argv))
        assert given["--ref-load"] == f"exp/InfiR2_{before}/checkpoints"
        assert given["--hf-checkpoint"] == "exp/sft-fp8"
    final, released = _weights(place / "exp" / "final"), _weights(place / "MODEL")
    assert final.shape == released.shape and not final.equal(released), "it has learnt something"
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
    assert 0.0 <= found["benchmarks"]["aime24"]["score"] <= 1.0, found


def _runs() -> list[tuple[str, str]]:
    from megatron_fp8_ext import presets

    lines = [line for line in COMMANDS if " run " in line]
    return [(line, presets.get(shlex.split(line)[2]).experiment) for line in lines]


def _weights(folder: Path) -> Any:
    """One matrix of the model."""
    from safetensors import safe_open

    with safe_open(next(folder.glob("*.safetensors")), "pt") as opened:
        return opened.get_tensor("model.layers.3.mlp.up_proj.weight")
