"""What a training command reads, by size and digest: runs on other data are not compared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fp8_ext.proof import plan

_SAMPLES, _SAMPLE_BYTES = 64, 65536
_WHOLE_BYTES = _SAMPLES * _SAMPLE_BYTES


def of_inputs(command: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return, for all that the command reads, its size and a digest.

    Corpora (`--data-path`), packed samples (`--sft-data`) and the checkpoint at the start (`--load`). The
    digest covers small files (a corpus' index: documents, lengths, order) whole, and of large ones 64
    evenly spaced pieces of 64 KiB, so that it costs little on terabytes.
    """
    found: dict[str, dict[str, Any]] = {}
    for prefix in plan.data_prefixes(command):
        index, tokens = (prefix.with_name(prefix.name + s) for s in (".idx", ".bin"))
        digest = hashlib.sha256()
        _digest_whole(index, digest)
        _digest_pieces(tokens, digest)
        found[prefix.name] = {"bytes": tokens.stat().st_size, "sha256": digest.hexdigest()}
    for folder in plan.input_folders(command):
        digest, size = hashlib.sha256(), 0
        for file in _files(folder):
            digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
            (_digest_pieces if file.stat().st_size > _WHOLE_BYTES else _digest_whole)(file, digest)
            size += file.stat().st_size
        found[folder.name] = {"bytes": size, "sha256": digest.hexdigest()}
    return found


def _files(folder: Path) -> list[Path]:
    """What decides what a folder holds: of packed samples the index, with each shard's own digest."""
    packed = folder / "index.json"
    if packed.is_file():  # the notes beside it name the place of the source
        return [packed]
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest_whole(path: Path, digest: Any) -> None:
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)


def _digest_pieces(path: Path, digest: Any) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(max(size - _SAMPLE_BYTES, 0) * index // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
