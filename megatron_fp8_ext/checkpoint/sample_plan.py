"""The sample plan: what fixes the order in which a run sees its data, as a JSON file in each checkpoint.

Megatron sizes and shuffles the training data by the number of samples the whole run asks for, so a run
that continues with another length sees another order, and repeats and skips samples. Whoever
continues from a checkpoint must ask for the same number; this file tells it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.files import write_atomically

FILE = "sample_plan.json"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One corpus of the blend: its share, and the size of its training part."""

    path: str
    weight: float
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """How the training data of a run was sized.

    Attributes:
        planned_samples: samples that the data was sized and shuffled for.
        available_samples: how many it holds in that very order (whole epochs are built).
        corpora: what it was built from.
    """

    planned_samples: int
    available_samples: int
    corpora: tuple[Corpus, ...] = ()

    def write(self, folder: Path) -> None:
        """Write it into an iteration's folder, by a temporary name and a rename."""
        write_atomically(folder / FILE, json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def read(folder: Path) -> SamplePlan | None:
    """Return the plan beside a checkpoint; None for a checkpoint that is not ours.

    Raises:
        UserError: the file is not a plan.
    """
    path = folder / FILE
    try:
        found = json.loads(path.read_text())
        return parse(found)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not a sample plan ({error!r}): delete it to derive the plan from the checkpoint"
        ) from error


def parse(found: Any) -> SamplePlan:
    """Return the plan that a JSON object holds; ValueError, TypeError or KeyError if it is none."""
    corpora = tuple(
        Corpus(
            path=str(row["path"]),
            weight=float(row["weight"]),
            documents=int(row["documents"]),
            tokens=int(row["tokens"]),
        )
        for row in found["corpora"]
    )
    plan = SamplePlan(
        planned_samples=int(found["planned_samples"]),
        available_samples=int(found["available_samples"]),
        corpora=corpora,
    )
    if plan.planned_samples <= 0:
        raise ValueError(f"planned_samples {plan.planned_samples}")
    return plan
