"""`python -m megatron_fp8_ext.demo.answers`: greedy answers to sums, checked; a command for `--score`."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_fp8_ext.demo import reasoning

BATCH = 256  # of 135M parameters: 7 GB of keys and values at 1024 tokens


def score(
    checkpoint: Path, reference: Path, problems: Sequence[Path], tokens: int
) -> dict[str, float]:
    """Return the shares of well-formed and of right answers to each file of problems, by its name.

    Args:
        checkpoint: of any format that `convert verify` reads.
        reference: folder with config.json, tokenizer and chat template of the model.
        problems: files of `reasoning.write`.
        tokens: longest answer.
    """
    import torch
    from transformers import AutoTokenizer

    from megatron_fp8_ext.checkpoint import logits

    tokenizer = AutoTokenizer.from_pretrained(reference, local_files_only=True, padding_side="left")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = logits.load_model(checkpoint, (reference,)).to(device)
    sets = {file: reasoning.read(file) for file in problems}
    questions = [reasoning.question(sample) for samples in sets.values() for sample in samples]
    found = _answers(model, tokenizer, questions, tokens)
    scores = {}
    for file, samples in sets.items():
        answers = list(itertools.islice(found, len(samples)))
        right = map(reasoning.verify, samples, answers)
        scores[f"well formed, {file.stem}"] = statistics.fmean(map(reasoning.well_formed, answers))
        scores[f"exact match, {file.stem}"] = statistics.fmean(right)
    return scores


def _answers(model: Any, tokenizer: Any, questions: list[str], tokens: int) -> Iterator[str]:
    import torch

    for start in range(0, len(questions), BATCH):
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in questions[start : start + BATCH]
        ]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            out = model.generate(
                **batch.to(model.device), max_new_tokens=tokens, do_sample=False,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        yield from tokenizer.batch_decode(
            out[:, batch.input_ids.shape[1] :], skip_special_tokens=True
        )


def _main(
    checkpoint: Annotated[Path, typer.Argument(help="Megatron checkpoint or model folder")],
    problems: Annotated[list[Path], typer.Argument(help="files of generated sums")],
    hf_reference: Annotated[Path, typer.Option(help="config.json, tokenizer and template")],
    max_tokens: Annotated[int, typer.Option(help="longest answer")] = 1024,
) -> None:
    """Print the shares of well-formed and of right answers as a line of JSON."""
    print(json.dumps(score(checkpoint, hf_reference, problems, max_tokens)))


if __name__ == "__main__":
    typer.run(_main)
