"""`convert demo`: a released model -> Megatron -> CPT in infir2 -> Hugging Face -> FP8 -> text."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_fp8_ext import training_log
from megatron_fp8_ext.checkpoint import (
    architecture,
    compare,
    fp8,
    gguf,
    huggingface,
    logits,
    megatron,
)
from megatron_fp8_ext.demo import run, text
from megatron_fp8_ext.demo.follow import quiet
from megatron_fp8_ext.errors import UserError

QUESTION = "What is the capital of France, and what is it known for?"
SEQ_LENGTH = 256
# A learning rate that a few iterations of continual pre-training do not spoil the model with.
TRAINING = (
    f"--seq-length {SEQ_LENGTH} --bf16 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable "
    "--micro-batch-size 1 --global-batch-size 1 --lr 1e-5 --min-lr 1e-6 --lr-decay-style cosine "
    "--lr-warmup-iters 2 --clip-grad 1.0 --split 100,0,0 --eval-iters 0 --eval-interval 1000000 "
    "--log-interval 1 --seed 1236 --tokenizer-type NullTokenizer --no-gradient-accumulation-fusion"
).split()


def main(output: Path, iterations: int) -> None:
    """Run the demo on SmolLM2-135M-Instruct; everything it writes is under `output`.

    Raises:
        UserError: a package is missing, or training failed (its log is named).
    """
    console = Console()
    began = time.monotonic()
    for name in ("released", "megatron", "trained", "hf", "fp8", "fp8-values"):
        shutil.rmtree(output / name, ignore_errors=True)  # an earlier demo's
    output.mkdir(parents=True, exist_ok=True)

    def step(what: str, action: Callable[[], Any]) -> Any:
        start = time.monotonic()
        with quiet(console, what):
            result = action()
        console.print(f"{what} ({time.monotonic() - start:.0f} s)", soft_wrap=True)
        for note in getattr(result, "notes", ()):
            console.print(f"  {note}", soft_wrap=True, style="dim")
        return result

    released, trained = output / "released", output / "trained"
    step(
        "1. SmolLM2-135M-Instruct, from GGUF to a Hugging Face folder",
        lambda: gguf.gguf_to_hf(text.tokenizer_file(), released),
    )
    step("2. to Megatron", lambda: megatron.hf_to_megatron(released, output / "megatron"))
    losses = step(
        f"3. {iterations} iterations of continual pre-training with --fp8-recipe infir2",
        lambda: _train(output, iterations),
    )
    console.print(f"  loss {' '.join(f'{loss:.2f}' for loss in losses)}", style="dim")
    step(
        "4. back to Hugging Face",
        lambda: megatron.megatron_to_hf(trained, output / "hf", released),
    )
    step("5. to FP8", lambda: fp8.hf_to_fp8(output / "hf", output / "fp8"))
    step("6. FP8 values in BF16", lambda: fp8.fp8_to_hf(output / "fp8", output / "fp8-values"))
    folder = huggingface.open_folder(output / "fp8")
    share = fp8.fp8_share(folder, architecture.from_config(folder.config, str(folder.path)))
    worst = min(row.sqnr_db for row in compare.compare(output / "hf", output / "fp8").rows)
    console.print(
        f"  {share:.0%} of linear weights in FP8, lowest SQNR {worst:.1f} dB", style="dim"
    )
    console.print(f"\n{QUESTION}")
    for what, path in (("trained, BF16", output / "hf"), ("trained, FP8", output / "fp8-values")):
        console.print(f"[bold]{what}:[/] {generate(path, QUESTION)}", soft_wrap=True)
    console.print(f"\n{time.monotonic() - began:.0f} s in all; the files are in {output}")


def _train(output: Path, iterations: int) -> list[float]:
    data = output / "corpus" / "text"
    if not data.with_suffix(".idx").is_file():
        from pydoc_data import topics

        from megatron_fp8_ext.megatron_plugin import corpus

        documents = (page for _, page in sorted(topics.topics.items()))
        corpus.write_indexed(documents, str(output / "released"), data)
    flags = (output / "megatron" / megatron.FLAGS_FILE).read_text().split()
    argv = [
        sys.executable, "-m", run.ENTRY, *flags, *TRAINING, "--train-iters", str(iterations),
        "--load", str(output / "megatron"), "--save", str(output / "trained"),
        "--save-interval", str(iterations), "--data-path", str(data),
        "--data-cache-path", str(output / "corpus" / "cache"), "--fp8-recipe", "infir2",
    ]  # fmt: skip
    log = output / "training.log"
    with log.open("w") as file:
        file.write(f"$ {' '.join(argv)}\n")
        file.flush()
        code = subprocess.run(argv, stdout=file, stderr=subprocess.STDOUT).returncode
    found = training_log.parse(log.read_text(errors="replace").splitlines())
    losses = [iteration.loss for iteration in found if iteration.loss is not None]
    if code != 0 or len(losses) != iterations:
        raise UserError(f"training stopped with exit code {code}; its log is {log}")
    return losses


def generate(path: Path, question: str, tokens: int = 48) -> str:
    """Return a model's greedy answer.

    Args:
        path: BF16 folder with a tokenizer and chat template.
        question: what the user says.
        tokens: longest answer.
    """
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    model = logits.load_model(path, ())
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()
