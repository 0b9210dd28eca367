"""From evalscope's files to scores: avg@k, pass@k, their standard errors, truncation.

avg@k is the mean over questions of the share of right answers. Two standard errors are given:
`se` takes the questions as a sample of all questions one could ask (their spread, clustered by
question); `se_answers` keeps the questions fixed and counts only the chance in the answers, which is
what separates two checkpoints on the same questions. After Miller 2024, "Adding error bars to evals".
pass@k is the unbiased estimator of Chen et al. 2021 (Codex), its error that over questions.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp8_ext.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One scored answer.

    Attributes:
        question: index of the question.
        right: its score is 1.
        stop: why it ended: `stop`, `max_tokens`, `model_length`, ...
        tokens: generated tokens.
        prompt_tokens: tokens of the rendered prompt; 0 where the server did not say.
        scored: evalscope could score it; otherwise it counts as wrong.
    """

    question: int
    right: bool
    stop: str
    tokens: int
    prompt_tokens: int
    scored: bool

    @property
    def truncated(self) -> bool:
        """Whether the limit on tokens ended it."""
        return self.stop in ("max_tokens", "length", "model_length")


def _lines(folder: Path) -> Iterable[dict[str, Any]]:
    for file in sorted(folder.glob("*/*.jsonl")):
        with file.open(encoding="utf-8") as text:
            for line in text:
                try:
                    yield json.loads(line)
                except ValueError:  # the last line of a killed run
                    continue


def finished(work: Path) -> int:
    """Return how many answers evalscope has written, cheaply."""
    count = 0
    for file in (work / "predictions").glob("*/*.jsonl"):
        with file.open("rb") as data:
            count += sum(block.count(b"\n") for block in iter(lambda: data.read(1 << 20), b""))
    return count


def read(work: Path) -> list[Answer]:
    """Return the scored answers in evalscope's folder, one for each sample id (the last)."""
    outputs = {row["index"]: row.get("model_output") or {} for row in _lines(work / "predictions")}
    answers: dict[int, Answer] = {}
    for row in _lines(work / "reviews"):
        output, score = outputs.get(row["index"]), row["sample_score"]
        if output is None:
            continue
        usage = output.get("usage") or {}
        value = (score["score"].get("value") or {}).get("acc")
        answers[row["index"]] = Answer(
            question=int(score["group_id"]),
            right=value is not None and float(value) >= 1.0,
            stop=(output.get("choices") or [{}])[0].get("stop_reason", "unknown"),
            tokens=int(usage.get("output_tokens") or 0),
            prompt_tokens=int(usage.get("input_tokens") or 0),
            scored=value is not None,
        )
    return [answers[index] for index in sorted(answers)]


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the probability that one of `k` answers drawn from `samples` is right.

    Raises:
        ValueError: k above samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be estimated from {samples} samples")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; nan for fewer than two values."""
    if len(values) < 2:
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True, kw_only=True)
class Score:
    """One benchmark's result; rates are in percent.

    Attributes:
        benchmark: its name.
        right: right answers to each question.
        samples: answers to each question.
        average: avg@samples.
        se: its standard error over questions (nan for one question).
        se_answers: its standard error with the questions fixed (nan for one sample).
        pass_at: (pass@k, its standard error) by k.
        truncated: share of answers that the limit on tokens ended.
        refused: answers that are the server's refusal of a prompt too long for its context.
        unscored: answers that evalscope could not score (they count as wrong).
        tokens: mean length of an answer.
        prompts: hash of each question's rendered prompt.
    """

    benchmark: str
    right: tuple[int, ...]
    samples: int
    average: float
    se: float
    se_answers: float
    pass_at: dict[int, tuple[float, float]]
    truncated: float
    refused: int
    unscored: int
    tokens: float
    prompts: tuple[str, ...]

    @property
    def questions(self) -> int:
        """Number of questions."""
        return len(self.right)


def score(
    name: str, answers: Sequence[Answer], prompts: Sequence[str], samples: int, ks: Sequence[int]
) -> Score:
    """Aggregate the answers to all questions.

    Raises:
        UserError: a question has not exactly `samples` answers.
    """
    counts = [0] * len(prompts)
    right = [0] * len(prompts)
    for answer in answers:
        counts[answer.question] += 1
        right[answer.question] += answer.right
    short = [q for q, count in enumerate(counts) if count != samples]
    if short:
        raise UserError(
            f"{name}: question {short[0]} has {counts[short[0]]} answers instead of {samples} (and "
            f"{len(short) - 1} more questions): run the same command again to complete them"
        )
    shares = [r / samples for r in right]
    within = sum(p * (1 - p) / (samples - 1) for p in shares) if samples > 1 else math.nan
    passes = {}
    for k in ks:
        each = [pass_at_k(samples, r, k) for r in right]
        passes[k] = (100 * statistics.fmean(each), 100 * standard_error(each))
    return Score(
        benchmark=name,
        right=tuple(right),
        samples=samples,
        average=100 * statistics.fmean(shares),
        se=100 * standard_error(shares),
        se_answers=100 * math.sqrt(within) / len(shares),
        pass_at=passes,
        truncated=100 * statistics.fmean(a.truncated for a in answers),
        refused=sum(a.stop == "model_length" for a in answers),
        unscored=sum(not a.scored for a in answers),
        tokens=statistics.fmean(a.tokens for a in answers),
        prompts=tuple(prompts),
    )


def warnings(result: Score, max_tokens: int, usual_tokens: int, full: int) -> list[str]:
    """Return what a reader of the score must know, each with its mend."""
    said = []
    mend = f"raise --max-tokens (now {max_tokens}; the reference's is {usual_tokens})"
    if max_tokens >= usual_tokens:
        mend = "the model may be looping: read the predictions"
    if result.truncated >= 100:
        said.append(f"all answers were cut at {max_tokens} tokens, the score means nothing: {mend}")
    elif result.truncated > 10:
        said.append(f"{result.truncated:.1f} % of the answers were cut: {mend}")
    if result.refused:
        said.append(
            f"{result.refused} answers are refusals, prompt and answer being longer than the server's "
            "context: lower --max-tokens or raise the server's context length"
        )
    if result.unscored:
        said.append(f"{result.unscored} answers could not be scored and count as wrong")
    if result.questions != full:
        said.append(
            f"{result.questions} questions instead of {full}: not comparable with published scores"
        )
    return said


def to_json(result: Score) -> dict[str, Any]:
    """Return a Score as JSON-ready data; nan becomes null."""
    return {
        "questions": result.questions,
        "samples": result.samples,
        "average": result.average,
        "se": _number(result.se),
        "se_answers": _number(result.se_answers),
        "pass_at": {str(k): {"value": v, "se": _number(e)} for k, (v, e) in result.pass_at.items()},
        "truncated": result.truncated,
        "refused": result.refused,
        "unscored": result.unscored,
        "tokens": result.tokens,
        "right": list(result.right),
        "prompts": list(result.prompts),
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
