"""Which checkpoint a run continues from, whatever a kill left behind."""

from __future__ import annotations

import os

import checkpoints
import pytest

from megatron_fp8_ext.checkpoint import complete
from megatron_fp8_ext.checkpoint.complete import Choice
from megatron_fp8_ext.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"


def three(root):
    for iteration in (2, 4, 6):
        checkpoints.write(root, iteration)
    return root / "iter_0000006"


def age(path, seconds):
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - seconds * 10**9))


def test_the_tracker_is_obeyed(tmp_path):
    three(tmp_path)
    assert complete.choose(tmp_path) == Choice(6)
    assert complete.choose(tmp_path / "nowhere") == Choice(None)


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("metadata.json", None, "no metadata.json"),
        ("metadata.json", 0, "metadata.json is cut short"),
        (".metadata", None, "cannot be read"),
        (".metadata", 40, "cannot be read"),
        ("__0_0.distcp", None, "__0_0.distcp is missing"),
        ("__0_0.distcp", 20, "__0_0.distcp has 20 of"),
    ],
)
def test_what_a_checkpoint_may_lack(tmp_path, name, size, reason):
    file = three(tmp_path) / name
    if size is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:size])
    assert reason in complete.gap(file.parent)
    chosen = complete.choose(tmp_path)
    assert chosen.iteration == 4 and chosen.repair and reason in chosen.reason
    complete.repair(tmp_path, chosen)
    assert (tmp_path / TRACKER).read_text() == "4"
    assert complete.choose(tmp_path).iteration == 4


@pytest.mark.parametrize("size", [None, 30])
def test_the_common_file_of_older_megatrons_belongs_to_it(tmp_path, size):
    folder = checkpoints.write(tmp_path, 4, common_file=True)
    assert complete.gap(folder) is None
    file = folder / "common.pt"
    if size is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:size])
    assert "common.pt is missing or cut short" in complete.gap(folder)


@pytest.mark.parametrize("text", [None, "", "  \n"])
def test_a_lost_tracker_is_written_anew(tmp_path, text):
    three(tmp_path)
    tracker = tmp_path / TRACKER
    tracker.unlink()
    if text is not None:
        tracker.write_text(text)
    chosen = complete.choose(tmp_path)
    assert chosen.iteration == 6 and chosen.repair
    complete.repair(tmp_path, chosen)
    assert complete.choose(tmp_path) == Choice(6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000002", "iter_0000004", "iter_0000006", TRACKER,
    ]  # fmt: skip


def test_a_checkpoint_finished_after_the_tracker_goes_first(tmp_path):
    newest = three(tmp_path)
    tracker = tmp_path / TRACKER
    tracker.write_text("4")
    # Set back by hand, after iteration 6 was saved: obeyed.
    age(newest / "metadata.json", 100)
    assert complete.choose(tmp_path) == Choice(4)
    # Killed between metadata.json and the tracker.
    age(tracker, 200)
    chosen = complete.choose(tmp_path)
    assert chosen.iteration == 6 and "still says 4" in chosen.reason


def test_the_first_save_was_cut_short(tmp_path):
    checkpoints.write(tmp_path, 2, tracker=False)
    (tmp_path / "iter_0000002" / "metadata.json").unlink()
    chosen = complete.choose(tmp_path)
    assert chosen.iteration is None and "iter_0000002: it has no metadata.json" in chosen.reason
    (tmp_path / TRACKER).touch()
    chosen = complete.choose(tmp_path)
    assert chosen.iteration is None and chosen.repair
    complete.repair(tmp_path, chosen)
    assert not (tmp_path / TRACKER).exists()


def test_nothing_complete_is_an_error(tmp_path):
    folder = checkpoints.write(tmp_path, 2)
    (folder / "metadata.json").unlink()
    with pytest.raises(UserError, match="names iteration 2, but iter_0000002 is not complete"):
        complete.choose(tmp_path)


@pytest.mark.parametrize("text", ["release", "nonsense"])
def test_what_is_not_ours_to_judge(tmp_path, text):
    (tmp_path / TRACKER).write_text(text)
    assert complete.choose(tmp_path) is None
    (tmp_path / TRACKER).write_text("3")
    (tmp_path / "iter_0000003" / "mp_rank_00").mkdir(parents=True)
    assert complete.choose(tmp_path) is None  # the legacy format
