"""`data pack` through its command line: shards, resume, bad input."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from chat import CHATML, write_tokenizer
from conftest import run

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.sft import inputs, pack_job, shards, statistics, template


def record(number, length=5):
    return {
        "messages": [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": "<think>" + "ab " * length + f"</think>{number}"},
        ]
    }


@pytest.fixture
def chat(tmp_path):
    return template.load(write_tokenizer(tmp_path / "tokenizer"))


def write(path, records):
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def options(**changes):
    return pack_job.Options(**{"seq_length": 256, **changes})


def contents(folder):
    data = shards.SampleShards(folder)
    return [(data[i].tokens.tolist(), data[i].mask.tolist()) for i in range(len(data))]


def test_samples_come_back_as_they_were_encoded(tmp_path, chat):
    records = [record(i, i % 7 + 1) for i in range(40)]
    file = write(tmp_path / "a.jsonl", records)
    index = pack_job.pack([file], chat, tmp_path / "out", options())
    want = chat.encode([pack_job.conversation.parse(each) for each in records])
    assert contents(tmp_path / "out") == [(s.tokens.tolist(), s.mask.tolist()) for s in want]
    assert sum(s["supervised"] for s in index["shards"]) == sum(s.mask.sum() for s in want)
    assert not list(shards.SampleShards(tmp_path / "out").verify())


def test_pieces_cover_every_line_once_whatever_their_size(tmp_path):
    file = write(tmp_path / "a.jsonl", [record(i, i) for i in range(50)])
    for size in (1, 100, 1000, 10**6):
        lines = [row for piece in inputs.pieces(file, size) for row in inputs.records(piece)]
        assert [line for line, _ in lines] == list(range(1, 51))
        assert [found for _, found in lines] == [record(i, i) for i in range(50)]


def test_workers_and_interruption_change_nothing(tmp_path, chat, monkeypatch):
    monkeypatch.setattr(inputs, "_SMALLEST", 500)
    file = write(tmp_path / "a.jsonl", [record(i, i) for i in range(60)])
    one, two = tmp_path / "one", tmp_path / "two"
    pack_job.pack([file], chat, one, options())
    assert len(list(one.glob("*.tokens"))) > 5
    pack_job.pack([file], chat, two, options(), workers=2)
    assert contents(one) == contents(two)

    # Interrupted: the index and some shards are missing; the finished ones are kept.
    (two / shards.INDEX).unlink()
    (two / "shard-000001.json").unlink()
    with pytest.raises(UserError, match="half-written"):
        shards.SampleShards(two)
    kept = (two / "shard-000002.tokens").stat().st_mtime_ns
    pack_job.pack([file], chat, two, options())
    assert (two / "shard-000002.tokens").stat().st_mtime_ns == kept
    assert contents(one) == contents(two)


def test_another_job_may_not_continue_here(tmp_path, chat):
    file = write(tmp_path / "a.jsonl", [record(1)])
    pack_job.pack([file], chat, tmp_path / "out", options())
    with pytest.raises(UserError, match="holds other inputs"):
        pack_job.pack([file], chat, tmp_path / "out", options(seq_length=128))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="not empty"):
        pack_job.pack([file], chat, tmp_path / "full", options())


def test_too_long_is_dropped_cut_or_refused(tmp_path, chat):
    file = write(tmp_path / "a.jsonl", [record(1), record(2, 200), record(3)])
    index = pack_job.pack([file], chat, tmp_path / "drop", options())
    assert index["dropped"] == {"longer than 256 tokens": 1}
    dropped = json.loads((tmp_path / "drop" / pack_job.DROPPED).read_text())
    assert (dropped["file"], dropped["line"]) == (str(file), 2)

    index = pack_job.pack([file], chat, tmp_path / "cut", options(too_long="truncate"))
    assert index["truncated"] == 1
    assert shards.SampleShards(tmp_path / "cut").lengths.max() == 256
    with pytest.raises(UserError, match=r"a.jsonl, line 2: .* tokens, longer than 256"):
        pack_job.pack([file], chat, tmp_path / "fail", options(too_long="fail"))
    # Cut inside the prompt: nothing would be learnt from it.
    cut = options(seq_length=12, too_long="truncate")
    with pytest.raises(UserError, match="none of the records"):
        pack_job.pack([file], chat, tmp_path / "prompt", cut)


def test_every_dropped_line_is_listed_in_order(tmp_path, chat, monkeypatch):
    monkeypatch.setattr(inputs, "_SMALLEST", 2000)
    files = [
        write(tmp_path / f"{name}.jsonl", [record(i, 200 if i % 3 else 1) for i in range(30)])
        for name in ("b", "a")
    ]
    index = pack_job.pack(files, chat, tmp_path / "out", options(), workers=2)
    assert len(index["shards"]) > 5 and index["dropped"] == {"longer than 256 tokens": 40}
    rows = [
        json.loads(line) for line in (tmp_path / "out" / pack_job.DROPPED).read_text().splitlines()
    ]
    want = [(str(file), i + 1) for file in files for i in range(30) if i % 3]
    assert [(row["file"], row["line"]) for row in rows] == want


def test_broken_lines_stop_with_their_number_or_are_counted(tmp_path, chat):
    file = tmp_path / "a.jsonl"
    good = json.dumps(record(1)).encode()
    file.write_bytes(b"\n".join([good, b'{"messages": "\xff"}', b"{", good, b""]))
    with pytest.raises(UserError, match=r"a.jsonl, line 2: broken UTF-8"):
        pack_job.pack([file], chat, tmp_path / "fail", options())
    index = pack_job.pack([file], chat, tmp_path / "drop", options(invalid="drop"))
    assert sum(index["dropped"].values()) == 2
    assert len(contents(tmp_path / "drop")) == 2


def test_half_of_a_surrogate_pair_is_a_broken_line(tmp_path, chat):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "response": "x \\ud800"}\n' + json.dumps(record(1)) + "\n")
    with pytest.raises(UserError, match=r"a.jsonl, line 1: .*surrogate"):
        pack_job.pack([file], chat, tmp_path / "out", options())
    # Nothing came of it, so the mended file may take its place.
    write(file, [record(1)])
    pack_job.pack([file], chat, tmp_path / "out", options())
    assert len(contents(tmp_path / "out")) == 1


def test_wrong_files_leave_nothing_behind(tmp_path, chat):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.txt").write_text("x")
    for name, words in (
        ("", "is a directory"),
        ("empty.jsonl", "is empty"),
        ("a.txt", "only .jsonl and .parquet"),
    ):
        with pytest.raises(UserError, match=words):
            pack_job.pack([tmp_path / name], chat, tmp_path / "out", options())
        assert not (tmp_path / "out").exists()


def test_parquet_rows_are_the_same_samples(tmp_path, chat):
    pyarrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")

    records = [record(i) for i in range(20)]
    parquet = tmp_path / "a.parquet"
    pq.write_table(pyarrow.Table.from_pylist(records), parquet, row_group_size=7)
    pack_job.pack([parquet], chat, tmp_path / "parquet", options())
    pack_job.pack([write(tmp_path / "a.jsonl", records)], chat, tmp_path / "jsonl", options())
    assert contents(tmp_path / "parquet") == contents(tmp_path / "jsonl")


def test_a_damaged_shard_is_named(tmp_path, chat):
    pack_job.pack([write(tmp_path / "a.jsonl", [record(1)])], chat, tmp_path / "out", options())
    file = tmp_path / "out" / "shard-000000.tokens"
    data = bytearray(file.read_bytes())
    data[4] ^= 1
    file.write_bytes(data)
    assert list(shards.SampleShards(tmp_path / "out").verify()) == ["shard-000000"]
    file.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"shard-000000.tokens has \d+ bytes instead of"):
        shards.SampleShards(tmp_path / "out")


def test_statistics_count_what_is_there(tmp_path, chat):
    records = [record(i, i % 30 + 1) for i in range(200)]
    pack_job.pack([write(tmp_path / "a.jsonl", records)], chat, tmp_path / "out", options())
    data = shards.SampleShards(tmp_path / "out")
    found = statistics.measure(data, batch=64, ranks=2)
    assert found.samples == 200 and found.tokens == data.lengths.sum()
    assert sum(count for _, _, count in found.histogram) == 200
    assert 0.8 < found.epoch_fill <= 1 and 0 < found.batch_fill <= found.epoch_fill
    assert np.isclose(found.mean, data.lengths.mean())


def command(*argv):
    return run([sys.executable, "-m", "megatron_fp8_ext.cli", "data", "pack", *map(str, argv)])


def test_the_command_prints_statistics_and_refuses_in_one_line(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", CHATML)
    file = write(tmp_path / "a.jsonl", [record(i) for i in range(8)])
    flags = ("--tokenizer", tokenizer, "--output", tmp_path / "out", "--seq-length", 256)
    done = command(file, *flags)
    assert done.code == 0, done.output
    assert "in the loss" in done.output and "--sft-data" in done.output
    assert (tmp_path / "out" / statistics.STATISTICS).is_file()
    for argv, words in (
        ((tmp_path / "none.jsonl", *flags), "does not exist"),
        ((file, *flags, "--too-long", "cut"), "--too-long"),
        ((file, *flags, "--chat-template", tmp_path / "none"), "--chat-template"),
    ):
        refused = command(*argv)
        assert refused.code == 2 and words in refused.output, refused.output
        assert "Traceback" not in refused.output
