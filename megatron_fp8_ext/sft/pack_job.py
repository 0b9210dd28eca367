"""`data pack`: chat data -> shards. Parallel over processes, in constant memory, resumable by shard."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.files import open_atomically, write_atomically
from megatron_fp8_ext.sft import conversation, inputs, shards
from megatron_fp8_ext.sft.conversation import InvalidRecord
from megatron_fp8_ext.sft.inputs import Piece
from megatron_fp8_ext.sft.shards import Sample
from megatron_fp8_ext.sft.template import ChatTemplate
from megatron_fp8_ext.tokenizer import fingerprint

TooLong = Literal["drop", "truncate", "fail"]
Invalid = Literal["fail", "drop"]
DROPPED = "dropped.jsonl"
_BATCH = 64
_KEPT = ("name", "samples", "tokens", "supervised", "sha256")  # of a shard, in the index


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decides the contents of the shards.

    Attributes:
        seq_length: tokens of the longest sample kept.
        too_long: what happens to a longer one.
        invalid: what happens to a record that cannot be trained on.
    """

    seq_length: int
    too_long: TooLong = "drop"
    invalid: Invalid = "fail"


@dataclass(frozen=True)
class _Setup:
    """What a worker needs; plain strings, so that it can be sent to a new process."""

    folder: str
    options: Options
    tokenizer: str
    template: str
    special: dict[str, str]
    split_tool_turns: bool
    dtype: str


def pack(
    paths: list[Path],
    chat: ChatTemplate,
    folder: Path,
    options: Options,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the shards of `paths` under `folder` and return the contents of `index.json`.

    Run again after an interruption, with the same inputs and options, it keeps the finished shards.

    Args:
        paths: JSONL and parquet files.
        chat: template and tokenizer.
        folder: directory; created.
        options: see Options.
        workers: processes.
        progress: called with (bytes done, bytes in all).

    Raises:
        UserError: bad input (file, line and reason), or a folder that holds something else.
    """
    total = sum(path.stat().st_size for path in paths if path.is_file())
    job = _job(paths, chat, options)
    _claim(folder, job)
    vocabulary = chat.tokenizer.get_vocab_size()
    setup = _Setup(
        folder=str(folder),
        options=options,
        tokenizer=chat.tokenizer.to_str(),
        template=chat.source,
        special=chat.special,
        split_tool_turns=chat.split_tool_turns,
        dtype="uint16" if vocabulary <= 2**16 else "uint32",
    )
    size = inputs.piece_bytes(total)
    cut = (inputs.pieces(path, size) for path in paths)
    numbered = (
        (f"shard-{number:06d}", piece)
        for number, piece in enumerate(itertools.chain.from_iterable(cut))
    )
    done = 0
    records = []
    reasons: Counter[str] = Counter()
    for record, piece in _run(setup, numbered, workers):
        reasons.update(reason for _, reason in record["dropped"])
        # Without its lists of lines: they may be as long as the data.
        records.append({key: record[key] for key in (*_KEPT, "truncated")})
        done += piece.size
        progress(min(done, total), total)
    records.sort(key=lambda record: str(record["name"]))
    kept = sum(record["samples"] for record in records)
    _write_dropped(folder, [str(record["name"]) for record in records])
    if kept == 0:
        raise UserError(
            f"none of the records can be trained on; {folder / DROPPED} says why of each"
        )
    index = {
        "format": shards.FORMAT,
        "tokenizer": {
            "tokenizer": fingerprint(chat.tokenizer),
            "fingerprint": chat.fingerprint(),
            "vocab_size": vocabulary,
        },
        "seq_length": options.seq_length,
        "dtype": setup.dtype,
        "truncated": sum(record["truncated"] for record in records),
        "dropped": dict(sorted(reasons.items())),
        "shards": [{key: record[key] for key in _KEPT} for record in records],
    }
    write_atomically(folder / shards.INDEX, json.dumps(index, indent=1))
    return index


def _job(paths: list[Path], chat: ChatTemplate, options: Options) -> str:
    files = []
    for path in paths:
        inputs.check(path)
        stat = path.stat()
        files.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    parts = [shards.FORMAT, chat.fingerprint(), asdict(options), files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _claim(folder: Path, job: str) -> None:
    """Make the folder this job's own, or continue in it."""
    file = folder / shards.JOB
    if file.is_file():
        try:
            found = json.loads(file.read_text())["job"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged; delete {folder} and pack again") from error
        if found != job and any(folder.glob("shard-*.json")):
            raise UserError(
                f"{folder} holds other inputs, another tokenizer, template or options; give another "
                "--output, or delete it"
            )
        if found != job:  # it came to nothing, such as for a line that is mended now
            write_atomically(file, json.dumps({"job": job}))
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {folder} is not empty; give a new directory")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({"job": job}))


def _run(
    setup: _Setup, numbered: Iterator[tuple[str, Piece]], workers: int
) -> Iterator[tuple[dict[str, Any], Piece]]:
    """Yield the record of each shard as it gets done, a few pieces per worker in flight."""
    todo: Iterator[tuple[str, Piece]] = numbered
    if workers <= 1:
        for name, piece in todo:
            yield _finished(setup, name) or _write(setup, _chat(setup), name, piece), piece
        return
    # A fresh interpreter: forking a process whose tokenizer has threads can hang.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (setup,))
    try:
        running: dict[concurrent.futures.Future[dict[str, Any]], Piece] = {}
        more = True
        while more or running:
            while more and len(running) < 2 * workers:
                task = next(todo, None)
                if task is None:
                    more = False
                    break
                record = _finished(setup, task[0])
                if record is not None:
                    yield record, task[1]
                    continue
                running[pool.submit(_work, *task)] = task[1]
            ready, _ = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in ready:
                yield future.result(), running.pop(future)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died (out of memory?); run the command again, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[_Setup, ChatTemplate] | None = None


def _start_worker(setup: _Setup) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    _worker = (setup, _chat(setup))


def _work(name: str, piece: Piece) -> dict[str, Any]:
    assert _worker is not None
    return _write(*_worker, name, piece)


def _chat(setup: _Setup) -> ChatTemplate:
    tokenizer = Tokenizer.from_str(setup.tokenizer)
    return ChatTemplate(setup.template, tokenizer, setup.special, setup.split_tool_turns)


def _finished(setup: _Setup, name: str) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        record: dict[str, Any] = json.loads((Path(setup.folder) / f"{name}.json").read_text())
        return record
    return None


def _write(setup: _Setup, chat: ChatTemplate, name: str, piece: Piece) -> dict[str, Any]:
    """Tokenize one piece and write its shard."""
    options = setup.options
    samples: list[Sample] = []
    dropped: list[tuple[int, str]] = []
    truncated: list[int] = []

    def drop(line: int, reason: str) -> None:
        if options.invalid == "fail":
            raise UserError(
                f"{piece.path}, line {line}: {reason}; mend or delete the line, or drop such records "
                "with --invalid drop"
            )
        dropped.append((line, reason))

    source = inputs.records(piece)
    while batch := list(itertools.islice(source, _BATCH)):
        lines, parsed = [], []
        for line, record in batch:
            try:
                if isinstance(record, InvalidRecord):
                    raise record
                parsed.append(conversation.parse(record))
                lines.append(line)
            except InvalidRecord as error:
                drop(line, str(error))
        for line, sample in zip(lines, chat.encode(parsed), strict=True):
            if isinstance(sample, InvalidRecord):
                drop(line, str(sample))
                continue
            if len(sample.tokens) > options.seq_length:
                reason = f"longer than {options.seq_length} tokens"
                if options.too_long == "fail":
                    raise UserError(
                        f"{piece.path}, line {line}: {len(sample.tokens)} tokens, {reason}; raise "
                        "--seq-length, or choose --too-long drop or truncate"
                    )
                if options.too_long == "drop":
                    dropped.append((line, reason))
                    continue
                truncated.append(line)
                cut = options.seq_length
                sample = Sample(sample.tokens[:cut], sample.mask[:cut])
            # The first token has nothing before it that could predict it.
            if not sample.mask[1:].any():
                if line in truncated[-1:]:
                    truncated.pop()
                    dropped.append((line, f"no response within {options.seq_length} tokens"))
                else:
                    drop(line, "no token of it counts in the loss")
                continue
            sample.mask[0] = False
            samples.append(sample)
    facts = {
        "file": piece.path,
        "dropped": dropped,
        "truncated": len(truncated),
        "truncated_lines": truncated,
    }
    record = shards.write_shard(Path(setup.folder), name, samples, setup.dtype, facts)
    return json.loads(json.dumps(record))  # as a later run reads it


def _write_dropped(folder: Path, names: list[str]) -> None:
    """One line for each dropped or truncated record: file, line, reason; shards are in order of both."""
    with open_atomically(folder / DROPPED) as file:
        for name in names:
            record = json.loads((folder / f"{name}.json").read_text())
            rows = [(line, reason) for line, reason in record["dropped"]]
            rows += [(line, "truncated") for line in record["truncated_lines"]]
            for line, reason in sorted(rows):
                row = {"file": record["file"], "line": line, "reason": reason}
                file.write(f"{json.dumps(row)}\n".encode())
