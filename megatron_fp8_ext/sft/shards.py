"""Memory-mapped shards of tokenized samples.

A shard is four files: `NAME.tokens` (uint16 or uint32), `NAME.mask` (one bit a token, 1 = in the loss),
`NAME.cuts` (int64 cu_seqlens: sample i is tokens `cuts[i]:cuts[i + 1]`, and its positions count from 0) and
`NAME.json` (counts, written last). `index.json` closes the directory. Every file is written under a
temporary name, synced and renamed, so one that has its final name is whole.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.files import write_atomically

INDEX = "index.json"
JOB = "job.json"
FORMAT = 1


@dataclass(frozen=True)
class Sample:
    """A tokenized conversation.

    Attributes:
        tokens: `[n]` int64.
        mask: `[n]` bool, True where the token counts in the loss.
    """

    tokens: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]


def write_shard(
    folder: Path, name: str, samples: list[Sample], dtype: str, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write one shard; returns what its `.json` says: counts, digest and `facts`."""
    empty = Sample(np.zeros(0, np.int64), np.zeros(0, np.bool_))
    tokens = np.concatenate([s.tokens for s in (*samples, empty)]).astype(dtype).tobytes()
    mask = np.concatenate([s.mask for s in (*samples, empty)])
    cuts = np.cumsum([0, *(len(s.tokens) for s in samples)], dtype=np.int64)
    packed = np.packbits(mask).tobytes()
    digest = hashlib.sha256(tokens)
    for data in (packed, cuts.tobytes()):
        digest.update(data)
    write_atomically(folder / f"{name}.tokens", tokens)
    write_atomically(folder / f"{name}.mask", packed)
    write_atomically(folder / f"{name}.cuts", cuts.tobytes())
    record = {
        "name": name,
        "samples": len(samples),
        "tokens": int(cuts[-1]),
        "supervised": int(mask.sum()),
        "sha256": digest.hexdigest(),
        **facts,
    }
    write_atomically(folder / f"{name}.json", json.dumps(record))
    return record


def fingerprint(index: dict[str, Any]) -> str:
    """Return the digest of a data set: what it holds and how it was tokenized."""
    parts = [index["tokenizer"]["fingerprint"], str(index["seq_length"])]
    parts += [shard["sha256"] for shard in index["shards"]]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class _Shard:
    path: Path
    dtype: str

    @functools.cached_property
    def tokens(self) -> npt.NDArray[Any]:
        return np.memmap(self.path.with_suffix(".tokens"), dtype=self.dtype, mode="r")

    @functools.cached_property
    def mask(self) -> npt.NDArray[np.uint8]:
        return np.memmap(self.path.with_suffix(".mask"), dtype=np.uint8, mode="r")

    @functools.cached_property
    def cuts(self) -> npt.NDArray[np.int64]:
        return np.fromfile(self.path.with_suffix(".cuts"), dtype=np.int64)


class SampleShards:
    """The samples of a packed directory, by one running number.

    Attributes:
        index: contents of `index.json`.
        lengths: `[samples]` int32, tokens of each.
        supervised: tokens of the whole set that count in the loss.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a directory.

        Raises:
            UserError: missing, half-written, of another format, or damaged.
        """
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        dtype = str(self.index["dtype"])
        self._shards = []
        lengths = []
        for record in self.index["shards"]:
            if not record["samples"]:
                continue
            shard = _Shard(self.folder / record["name"], dtype)
            self._check(shard, record)
            self._shards.append(shard)
            lengths.append(np.diff(shard.cuts).astype(np.int32))
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int32)
        self._starts = np.cumsum([0, *(len(part) for part in lengths)])
        self.supervised = sum(record["supervised"] for record in self.index["shards"])

    @staticmethod
    def _check(shard: _Shard, record: dict[str, Any]) -> None:
        width = np.dtype(shard.dtype).itemsize
        for suffix, size in (
            (".tokens", record["tokens"] * width),
            (".mask", -(-record["tokens"] // 8)),
            (".cuts", (record["samples"] + 1) * 8),
        ):
            file = shard.path.with_suffix(suffix)
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise UserError(f"{file} {state}: delete {record['name']}.json and pack again")

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return int(np.max(self.lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, sample: int) -> Sample:
        which = int(np.searchsorted(self._starts, sample, side="right")) - 1
        shard, local = self._shards[which], sample - int(self._starts[which])
        start, end = int(shard.cuts[local]), int(shard.cuts[local + 1])
        bits = np.unpackbits(shard.mask[start // 8 : -(-end // 8)])
        mask = bits[start % 8 : start % 8 + end - start].astype(np.bool_)
        return Sample(shard.tokens[start:end].astype(np.int64), mask)

    def verify(self) -> Iterable[str]:
        """Yield the names of shards whose bytes are not what was written (reads everything)."""
        for record in self.index["shards"]:
            digest = hashlib.sha256()
            for suffix in (".tokens", ".mask", ".cuts"):
                digest.update((self.folder / record["name"]).with_suffix(suffix).read_bytes())
            if digest.hexdigest() != record["sha256"]:
                yield str(record["name"])


def read_index(folder: Path) -> dict[str, Any]:
    """Return the contents of `index.json`.

    Raises:
        UserError: no such directory, half-written, or of another format.
    """
    if not folder.is_dir():
        raise UserError(f"--sft-data {folder}: no such directory; write it with `data pack`")
    file = folder / INDEX
    if not file.is_file():
        if (folder / JOB).is_file():
            raise UserError(
                f"{folder} is half-written ({INDEX} is missing): run its `megatron-fp8 data pack` "
                "command again, which continues where it stopped"
            )
        raise UserError(f"{folder} holds no packed data ({INDEX} is missing)")
    try:
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = index["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); pack the data again") from error
    if version != FORMAT:
        raise UserError(
            f"{folder} has format {version}, this version reads {FORMAT}; pack it again"
        )
    return index
