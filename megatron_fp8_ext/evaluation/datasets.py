"""Benchmark questions from local files, checked and copied in the form that evalscope reads.

Nothing is downloaded here. LiveCodeBench's own files hold tests as pickles, which evalscope would
unpickle; the copy holds them as JSON, read by an unpickler that builds nothing but strings.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import json
import pickle
import subprocess
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.evaluation import unpickle
from megatron_fp8_ext.evaluation.benchmarks import Benchmark
from megatron_fp8_ext.files import open_atomically

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_ALIASES = {"problem": ("Problem", "question"), "answer": ("Answer",)}
_LONGEST_TESTS = 1 << 30


@dataclass(frozen=True)
class Data:
    """A benchmark's questions as evalscope reads them.

    Attributes:
        folder: holds one JSONL file named after the split.
        source: the user's files.
        rows: number of questions.
        sha256: of the copy.
    """

    folder: Path
    source: tuple[Path, ...]
    rows: int
    sha256: str


def find(benchmark: Benchmark, places: Sequence[str]) -> tuple[Path, ...]:
    """Return the files of a benchmark below the `--data` places (`FOLDER` or `NAME=PATH`).

    Raises:
        UserError: none there.
    """
    tried = []
    for place in places:
        name, equals, path = place.partition("=")
        if equals and not Path(place).exists():
            if name != benchmark.name:
                continue
            files = _files(Path(path))
            tried.append(path)
        else:
            files = ()
            for stem in dict.fromkeys((benchmark.name, benchmark.evalscope)):
                candidates = [Path(place, stem), *(Path(place, stem + s) for s in _SUFFIXES)]
                files = next(filter(None, map(_files, candidates)), ())
                if files:
                    break
            tried.append(f"{place}/{benchmark.name}[{','.join(_SUFFIXES)}]")
        if files:
            return files
    raise UserError(
        f"no data for {benchmark.name}: looked at {', '.join(tried) or 'nothing'}; give --data "
        f"FOLDER with {benchmark.name}.jsonl in it or --data {benchmark.name}=FILE, or let evalscope "
        "fetch it with --download modelscope"
    )


def _files(path: Path) -> tuple[Path, ...]:
    if path.is_file():
        return (path,)
    if not path.is_dir():
        return ()
    for suffix in _SUFFIXES:  # one kind only: repositories often hold the same rows in two
        found = sorted(p for p in path.rglob(f"*{suffix}") if not p.name.startswith("dataset_info"))
        if found:
            return tuple(found)
    return ()


def prepare(benchmark: Benchmark, files: Sequence[Path], folder: Path, python: Path) -> Data:
    """Check the rows of `files` and write them to `folder/SPLIT.jsonl`.

    `python` is that of evalscope's environment; it reads parquet.

    Raises:
        UserError: an unreadable row (file and line), or no rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest, count = hashlib.sha256(), 0
    with open_atomically(folder / f"{benchmark.split}.jsonl") as out:
        for where, row in _rows(files, python):
            text = json.dumps(_checked(benchmark, row, where), ensure_ascii=False) + "\n"
            line = text.encode()
            digest.update(line)
            out.write(line)
            count += 1
        if count == 0:
            raise UserError(f"{', '.join(map(str, files))}: no rows for {benchmark.name}")
    return Data(folder, tuple(files), count, digest.hexdigest())


def _rows(files: Sequence[Path], python: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for file in files:
        if file.suffix == ".csv":
            csv.field_size_limit(1 << 30)
            with file.open(newline="", encoding="utf-8") as text:
                for number, row in enumerate(csv.DictReader(text), 2):
                    yield f"{file}, row {number}", row
            continue
        if file.suffix == ".parquet":
            runner = Path(__file__).with_name("runner.py")
            done = subprocess.run(
                [str(python), "-I", str(runner), "rows", str(file)], capture_output=True, text=True
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise UserError(f"{file} cannot be read as parquet: {last}")
            lines: Iterator[str] = iter(done.stdout.splitlines())
        else:
            text_of = file.read_text(encoding="utf-8") if file.suffix == ".json" else ""
            if text_of.lstrip().startswith("["):
                try:
                    found = json.loads(text_of)
                except ValueError as error:
                    raise UserError(f"{file}: not valid JSON: {error}") from error
                lines = (json.dumps(row) for row in found)
            else:
                lines = (line for line in file.open(encoding="utf-8"))
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}, line {number}: not valid JSON: {error}") from error
            yield f"{file}, line {number}", row


def _checked(benchmark: Benchmark, row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object with keys such as {benchmark.fields[0]!r}")
    row = dict(row)
    for name, others in _ALIASES.items():
        for other in others:
            if name not in row and row.get(other) not in (None, ""):
                row[name] = row[other]
    missing = [name for name in benchmark.fields if row.get(name) is None]
    if missing:
        raise UserError(f"{where}: no {missing[0]!r}, which {benchmark.name} needs")
    if benchmark.name.startswith("aime"):
        answer = row.get("answer", row.get("solution"))
        if answer is None or not str(answer).strip():
            raise UserError(f"{where}: neither 'answer' nor 'solution'")
        return {"problem": str(row["problem"]), "answer": str(answer).strip()}
    kept: dict[str, Any] = {name: row[name] for name in benchmark.fields}
    if benchmark.runs_code:
        for name in ("public_test_cases", "private_test_cases"):
            kept[name] = json.dumps(_tests(kept[name], f"{where}, {name}"))
        try:
            date = datetime.fromisoformat(str(kept["contest_date"]))
        except ValueError as error:
            raise UserError(f"{where}: contest_date: {error}") from error
        # With a T or a blank in it, evalscope's loader makes a timestamp of it, and then fails.
        kept["contest_date"] = date.isoformat(sep="_")
        if not isinstance(kept["metadata"], str):
            kept["metadata"] = json.dumps(kept["metadata"])
    return kept


def _tests(value: Any, where: str) -> Any:
    """Return test cases from JSON, or from LiveCodeBench's base64 of zlib of a pickled JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        pass
    try:
        unpacker = zlib.decompressobj()
        packed = unpacker.decompress(base64.b64decode(value, validate=True), _LONGEST_TESTS)
        return json.loads(unpickle.loads(packed))
    except (
        binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError
    ) as error:  # fmt: skip
        raise UserError(
            f"{where}: neither JSON nor LiveCodeBench's packed JSON: {error}"
        ) from error
