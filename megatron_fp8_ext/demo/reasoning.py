"""A reasoning set that checks itself: sums worked out digit by digit inside `<think>`.

Generated, not downloaded: every answer can be verified, and lengths spread tenfold as those of real chains
of thought do.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_fp8_ext.files import write_atomically


def problem(draw: random.Random, longest: int = 8) -> dict[str, Any]:
    """Return one chat sample: add two to `longest` numbers."""
    numbers = [
        draw.randrange(10 ** draw.randint(1, 4))
        for _ in range(min(2 + int(draw.expovariate(1)), longest))
    ]
    steps, total = [f"Start with {numbers[0]}."], numbers[0]
    for number in numbers[1:]:
        steps.append(f"{total} + {number}:")
        carry, left, right = 0, total, number
        for name in ("ones", "tens", "hundreds", "thousands", "ten-thousands"):
            a, b = left % 10, right % 10
            digit = a + b + carry
            steps.append(f"{name}: {a} + {b} + {carry} = {digit}, write {digit % 10}")
            carry, left, right = digit // 10, left // 10, right // 10
            if not (left or right or carry):
                break
        total += number
        steps.append(f"So far {total}.")
    question = f"What is {' + '.join(map(str, numbers))}?"
    answer = "<think>\n" + "\n".join(steps) + f"\n</think>\n\\boxed{{{total}}}"
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def verify(sample: dict[str, Any], answer: str) -> bool:
    """Whether an answer to a sample's question is right."""
    wanted = sum(map(int, re.findall(r"\d+", question(sample))))
    found = re.search(r"\\boxed\{(\d+)\}", answer)
    return found is not None and int(found.group(1)) == wanted


def well_formed(answer: str) -> bool:
    """Whether an answer thinks, then states one number, as the samples do."""
    return re.fullmatch(r"<think>\n.+\n</think>\n\\boxed\{\d+\}\s*", answer, re.DOTALL) is not None


def question(sample: dict[str, Any]) -> str:
    """Return what a sample asks."""
    return str(sample["messages"][0]["content"])


def write(
    path: Path, count: int, seed: int = 1236, longest: int = 8, without: Collection[str] = ()
) -> None:
    """Write `count` samples as JSONL, none that asks a question in `without`."""
    draw = random.Random(seed)
    lines: list[str] = []
    while len(lines) < count:
        sample = problem(draw, longest)
        if question(sample) not in without:
            lines.append(json.dumps(sample) + "\n")
    write_atomically(path, "".join(lines))


def read(path: Path) -> list[dict[str, Any]]:
    """Return the samples of a file of `write`."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
