"""What a packed directory holds and how well it packs: numbers, a table of lengths, a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fp8_ext.files import write_atomically
from megatron_fp8_ext.packing.balance import schedule
from megatron_fp8_ext.packing.bins import Integers, best_fit_decreasing
from megatron_fp8_ext.packing.order import EpochOrder
from megatron_fp8_ext.picture import write_svg
from megatron_fp8_ext.sft.shards import SampleShards, fingerprint

STATISTICS = "statistics.json"
PICTURE = "lengths.svg"
ALIGNMENT = 128
_STEPS = 200  # global batches that the batch-scope fill is measured on


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Numbers of one packed directory.

    Attributes:
        samples: kept.
        tokens: of them.
        supervised: tokens in the loss.
        truncated: samples cut at the sequence length.
        dropped: number of records dropped, by reason.
        longest: tokens of the longest sample.
        mean: tokens of the mean sample.
        median: tokens of the median sample.
        histogram: samples by length, `[from, to, samples]` in powers of two.
        epoch_packs: packs when a whole epoch is packed at once.
        epoch_fill: tokens / (packs x sequence length) of those.
        epoch_padding: padding tokens that align those packs to 128, as a share of all tokens.
        batch_fill: the same fill when each global batch is packed for itself.
        batch_padding: its padding for alignment, as a share of all tokens.
        batch: the (global batch size, data-parallel ranks) that batch_fill is for.
        fingerprint: of the data set.
    """

    samples: int
    tokens: int
    supervised: int
    truncated: int
    dropped: dict[str, int]
    longest: int
    mean: float
    median: float
    histogram: list[tuple[int, int, int]]
    epoch_packs: int
    epoch_fill: float
    epoch_padding: float
    batch_fill: float
    batch_padding: float
    batch: tuple[int, int]
    fingerprint: str


def measure(data: SampleShards, batch: int = 64, ranks: int = 8) -> Statistics:
    """Return the statistics of a packed directory."""
    index, lengths = data.index, data.lengths
    capacity = int(index["seq_length"])
    packs = best_fit_decreasing(lengths, capacity)
    loads = packs.loads(lengths)
    total = int(lengths.sum(dtype=np.int64))
    fill, padding = _batch_scope(lengths, capacity, batch, ranks)
    return Statistics(
        samples=len(lengths),
        tokens=total,
        supervised=data.supervised,
        truncated=int(index["truncated"]),
        dropped=dict(index["dropped"]),
        longest=int(np.max(lengths)),
        mean=float(lengths.mean()),
        median=float(np.median(lengths)),
        histogram=_histogram(lengths),
        epoch_packs=len(packs),
        epoch_fill=total / (len(packs) * capacity),
        epoch_padding=int((-loads % ALIGNMENT).sum()) / total,
        batch_fill=fill,
        batch_padding=padding,
        batch=(batch, ranks),
        fingerprint=fingerprint(index),
    )


def _batch_scope(lengths: Integers, capacity: int, batch: int, ranks: int) -> tuple[float, float]:
    batch = min(batch, len(lengths))
    order = EpochOrder(len(lengths), seed=0)
    tokens = slots = padding = 0
    for step in range(min(_STEPS, len(lengths) // batch)):
        sizes = lengths[order.take(step * batch, batch)]
        plan = schedule(sizes, ranks, capacity)
        loads = [int(sizes[pack].sum()) for packs in plan for pack in packs]
        tokens += sum(loads)
        slots += len(loads)
        padding += sum(-load % ALIGNMENT if load else ALIGNMENT for load in loads)
    return tokens / (slots * capacity), padding / tokens


def _histogram(lengths: Integers) -> list[tuple[int, int, int]]:
    top = int(np.max(lengths)).bit_length()
    edges = [1 << power for power in range(top + 1)]
    counts = np.histogram(lengths, bins=edges)[0].tolist()
    rows = [(edges[i], edges[i + 1] - 1, count) for i, count in enumerate(counts)]
    while rows and rows[0][2] == 0:
        rows.pop(0)
    return rows


def save(folder: Path, statistics: Statistics, lengths: Integers) -> bool:
    """Write `statistics.json`, and `lengths.svg` where matplotlib is there; whether it was."""
    write_atomically(folder / STATISTICS, json.dumps(asdict(statistics), indent=1))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure: Any = Figure(figsize=(8, 3.4), layout="tight")
    axes = figure.subplots()
    longest = max(statistics.longest, 2)
    axes.hist(lengths, bins=np.geomspace(max(int(np.min(lengths)), 1), longest + 1, 60))
    axes.set_xscale("log")
    axes.set_xlabel("tokens of a sample")
    axes.set_ylabel("samples")
    axes.spines[["top", "right"]].set_visible(False)
    write_svg(folder / PICTURE, figure)
    return True
