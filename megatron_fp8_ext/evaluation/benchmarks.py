"""The reference's four benchmarks: their settings, its published scores, and what differs today.

Settings and scores: InfiR2's `scripts/eval` and README. It ran evalscope at pull request #734
(commit 89769418, 2025-07-23, before evalscope 1.0); `differences` says what changed since.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from megatron_fp8_ext.errors import UserError, unknown_name

REFERENCE_EVALSCOPE = "pull request #734 (89769418, 2025-07-23)"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark with the reference's settings.

    Attributes:
        name: what the user types.
        title: what the tables say.
        evalscope: the name in evalscope 1.14.
        split: the split that evalscope reads; our copy of the data is named after it.
        fields: keys that every row of the data needs.
        questions: rows of the full benchmark.
        max_tokens: longest answer, in tokens.
        samples: answers to each question.
        batch: requests in flight.
        published: the reference's accuracy in percent, by model size.
        strip_thinking: score only what follows `</think>`.
        runs_code: answers are programs, which only a container may run.
        dates: first and last contest date, `YYYY-MM-DD`.
        differences: what makes a number here differ from the reference's.
    """

    name: str
    title: str
    evalscope: str
    split: str
    fields: tuple[str, ...]
    questions: int
    max_tokens: int
    samples: int
    batch: int
    published: Mapping[str, float]
    temperature: float = 0.65
    top_p: float = 0.95
    strip_thinking: bool = True
    runs_code: bool = False
    dates: tuple[str, str] | None = None
    differences: tuple[str, ...] = field(default=())

    def allows_pass_at(self, k: int, samples: int) -> None:
        """Raise a UserError where pass@k cannot be estimated from `samples` answers."""
        if not 1 <= k <= samples:
            raise UserError(
                f"--pass-at {k} needs 1 <= k <= samples, and {self.name} has {samples} samples a "
                f"question: raise --samples to {k} or drop --pass-at {k}"
            )


_PROMPT = (
    "the reference wrote ChatML tags into the message, which the server's chat template wraps again; "
    "here the template is applied once, by the server, and evalscope 1.14 adds its own wording "
    "(answer inside \\boxed{})"
)
_N = "the reference asked the server for n answers in one request; here each answer is a request"
_THINK = "the reference strips up to </think> for AIME only; here everywhere"


def _aime(year: int, published: Mapping[str, float]) -> Benchmark:
    return Benchmark(
        name=f"aime{year - 2000}",
        title=f"AIME {year}",
        evalscope=f"aime{year - 2000}",
        split="test",
        fields=("problem",),
        questions=30,
        max_tokens=31000,
        samples=32,
        batch=32,
        published=MappingProxyType(dict(published)),
        differences=(_PROMPT, _N, "evalscope 1.14 compares integers only; #734 had a looser match"),
    )


AIME24 = _aime(2024, {"1.5B": 17.39, "7B": 55.73})
AIME25 = _aime(2025, {"1.5B": 18.45, "7B": 40.62})
GPQA = Benchmark(
    name="gpqa",
    title="GPQA diamond",
    evalscope="gpqa_diamond",
    split="train",
    fields=(
        "Question",
        "Correct Answer",
        "Incorrect Answer 1",
        "Incorrect Answer 2",
        "Incorrect Answer 3",
    ),
    questions=198,
    max_tokens=26000,
    samples=8,
    batch=32,
    published=MappingProxyType({"1.5B": 29.48, "7B": 45.33}),
    differences=(
        "5 examples in the prompt in #734, none in evalscope 1.14 (chain of thought is asked for)",
        "choices are shuffled, once for each question, by a hash of its text",
        _N,
        _THINK,
    ),
)
LIVECODEBENCH = Benchmark(
    name="livecodebench",
    title="LiveCodeBench v5",
    evalscope="live_code_bench",
    split="test",
    fields=(
        "question_content",
        "starter_code",
        "public_test_cases",
        "private_test_cases",
        "metadata",
        "contest_date",
    ),
    questions=279,
    max_tokens=27000,
    samples=8,
    batch=8,
    published=MappingProxyType({"1.5B": 17.10, "7B": 40.31}),
    runs_code=True,
    dates=("2024-08-01", "2025-02-01"),
    differences=(
        "the reference's max_new_tokens is no field of the OpenAI route, so its cap of 27000 did not "
        "apply; here it does",
        "the reference ran programs on the host; here only in a container without network, each test "
        "in a process of its own with 6 s, the start of Python included",
        "the last day ends at midnight: contests later on 2025-02-01 are left out",
        _N,
        _THINK,
    ),
)
BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {b.name: b for b in (AIME24, AIME25, GPQA, LIVECODEBENCH)}
)


def get(name: str) -> Benchmark:
    """Return a benchmark by the name a user types.

    Raises:
        UserError: no such benchmark.
    """
    try:
        return BENCHMARKS[name]
    except KeyError:
        raise unknown_name("benchmark", name, BENCHMARKS) from None
