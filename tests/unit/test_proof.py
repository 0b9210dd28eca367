"""The comparison's parts: plan, resumable runs (of a fake trainer), statistics and the rule."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.proof import fingerprint, plan, record, result, run, tables, verdict

QUIET = Console(quiet=True)

# Prints what Megatron prints; crashes, or waits, where its environment says so.
TRAINER = """
import os, sys, time
from pathlib import Path
def value(flag):
    return sys.argv[len(sys.argv) - sys.argv[::-1].index(flag)] if flag in sys.argv else None
steps, seed, recipe = int(value("--train-iters")), int(value("--seed")), value("--fp8-recipe")
print('megatron_fp8_ext: versions: {"megatron": "%s", "device": "CPU"}' % os.environ.get("V", "1"))
save, start = value("--save"), 0
if os.environ.get("MEMORY"):  # for so many runs at a time
    mine = Path(os.environ["MEMORY"]) / str(os.getpid())
    mine.touch()
    time.sleep(1)
    crowd = len(list(mine.parent.iterdir()))
    time.sleep(1)
    mine.unlink()
    if crowd > 1:
        raise RuntimeError("CUDA out of memory. Tried to allocate 38.00 MiB")
if value("--load"):
    start = int((Path(value("--load")) / "latest_checkpointed_iteration.txt").read_text())
for i in range(start + 1, steps + 1):
    loss = 5 - i / steps + 0.1 * seed + (0 if recipe == "bf16" else 0.001) + i % 2 * 1e-5
    print(f" iteration {i:8d}/{steps:8d} | consumed samples: 1 | elapsed time per iteration (ms): 10.0 |"
          f" learning rate: 1.0E-3 | global batch size: 4 | lm loss: {loss:.6E} | grad norm: 1.000 |")
    if save and i % 5 == 0:
        Path(save).mkdir(parents=True, exist_ok=True)
        (Path(save) / "latest_checkpointed_iteration.txt").write_text(str(i))
    if os.environ.get("CRASH") == f"{recipe} {i}":
        raise RuntimeError("out of luck")
    time.sleep(float(os.environ.get("SLOW", "0")))
if recipe != "bf16":
    print("megatron_fp8_ext: emulated casts on rank 0: grad columns 240, grad rows 240, weight 240")
"""


@pytest.fixture
def trainer(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    for suffix in (".idx", ".bin"):
        (tmp_path / f"text{suffix}").write_bytes(b"some text" * 100)
    return [sys.executable, str(script), "--seq-length", "16", "--seed", "7", "--data-path",
            str(tmp_path / "text")]  # fmt: skip


def members(trainer, output, recipes=("bf16", "infir2"), seeds=2, steps=20, extra=()):
    return plan.plan([*trainer, *extra], recipes, seeds, steps, output)


def test_plan_gives_each_member_its_own_flags(tmp_path):
    command = [
        "torchrun",
        "x.py",
        "--lr",
        "1",
        "--fp8-recipe",
        "infir2",
        "--save",
        "old",
        "--seed=3",
    ]
    found = plan.plan(command, ["infir2", "tensorwise:e4m3", "control-1bit"], 2, 500, tmp_path)
    assert [m.name for m in found[:4]] == [
        "bf16-seed3", "infir2-seed3", "tensorwise-e4m3-seed3", "control-1bit-seed3",
    ]  # fmt: skip
    for member in found:
        assert member.argv[:4] == ("torchrun", "x.py", "--lr", "1")
        assert member.argv.count("--fp8-recipe") == 1 and "old" not in member.argv
        assert str(member.seed) == member.argv[member.argv.index("--seed") + 1]
    native, control = found[2].argv, found[3].argv
    assert native[-4:] == ("--fp8-recipe", "tensorwise", "--fp8-format", "e4m3")
    assert control[-1] == "--fp8-emulate"
    assert native[native.index("--fp8-stats-interval") + 1] == "50"
    assert "--fp8-stats-interval" not in found[0].argv


@pytest.mark.parametrize(
    ("recipes", "command", "words"),
    [
        (["infr2"], ["x"], "did you mean 'infir2'"),
        (["infir2:e4m3"], ["x"], "has the options emulated, fused, unfused, stash"),
        (["control-1bit:stash"], ["x"], "has the options emulated"),
        (["bf16:emulated"], ["x"], "has no option"),
        (["infir2"], ["x", "--infir2-stash"], "infir2:fused, infir2:unfused or"),
        (["delayed:x"], ["x"], "e4m3 or hybrid"),
        (["infir2", "infir2"], ["x"], "names infir2 twice"),
        (["infir2"], ["x", "--train-samples", "5"], "replace --train-samples by --steps"),
        (["infir2"], ["x", "--lr-wsd-decay-iters", "30"], "longer than --steps 20"),
    ],
)
def test_bad_plans(recipes, command, words, tmp_path):
    with pytest.raises(UserError, match=words):
        plan.plan(command, recipes, 2, 20, tmp_path)


def test_resumed_member_loads_its_own_checkpoint(tmp_path):
    command = ["x", "--load", "start", "--finetune", "--no-load-optim", "--save", "s"]
    argv = plan.plan(command, ["bf16"], 1, 20, tmp_path)[0].resumed()
    assert argv.count("--load") == 1 and argv[-1] == str(tmp_path / "bf16-seed1234" / "checkpoints")
    assert "--finetune" not in argv and "--no-load-optim" not in argv


def test_a_second_stage_loads_what_each_run_of_the_first_left(tmp_path):
    command = ["x", "--load", "stage1/{run}/weights"]
    found = plan.plan(command, ["bf16", "infir2"], 1, 20, tmp_path)
    loads = [member.argv[member.argv.index("--load") + 1] for member in found]
    assert loads == ["stage1/bf16-seed1234/weights", "stage1/infir2-seed1234/weights"]
    assert found[0].common == found[1].common  # so the two may be compared


def test_finished_comparison(trainer, tmp_path):
    run.execute(members(trainer, tmp_path / "out"), QUIET)
    found = result.build(record.read_all([tmp_path / "out"]))
    infir2 = found.recipes[1]
    # Last fifth of 20 steps: 17 to 20; loss 5 - i/20 + seed/10.
    for each in infir2.runs:
        base = 5 - 18.5 / 20 + 0.1 * each.run.seed + 0.5e-5
        assert each.gap == pytest.approx(0.001 / base, rel=1e-3)
        assert each.tokens_per_second == pytest.approx(6400)
    assert infir2.gap.low < infir2.gap.mean < infir2.gap.high < verdict.MARGIN
    assert infir2.gemms_per_iteration == 36
    assert infir2.verdict.kind == "inconclusive" and "fewer than 200" in infir2.verdict.why
    assert "no negative control" in found.control_note


def test_crashed_run_is_shown_and_goes_on_from_its_checkpoint(trainer, tmp_path, monkeypatch):
    out = tmp_path / "out"
    planned = members(trainer, out, extra=["--save", "x"])
    monkeypatch.setenv("CRASH", "infir2 13")
    run.execute(planned, QUIET)
    found = result.build(record.read_all([out]))
    states = {r.run.folder.name: (r.run.status, r.run.why) for r in found.runs}
    assert states["bf16-seed7"] == ("finished", "")
    assert states["infir2-seed7"] == ("crashed", "RuntimeError: out of luck")
    assert found.recipes[1].verdict.kind == "inconclusive"
    monkeypatch.delenv("CRASH")
    run.execute(planned, QUIET)
    found = result.build(record.read_all([out]))
    assert all(r.run.status == "finished" for r in found.runs)
    log = (out / "infir2-seed7" / "log.txt").read_text()
    attempts = [line for line in log.splitlines() if line.startswith("$ ")]
    assert len(attempts) == 2 and "--load" in attempts[1] and "--load" not in attempts[0]
    resumed = found.recipes[1].runs[0].run
    assert sorted(resumed.iterations) == list(range(1, 21))
    # The second iteration after each start is a mean of two in Megatron's log.
    assert set(range(1, 21)) - set(resumed.losses) == {2, 12}


def test_interrupted_comparison_ends_its_children(trainer, tmp_path):
    out = tmp_path / "out"
    cli = [sys.executable, "-m", "megatron_fp8_ext.cli", "compare", "--output", str(out)]
    options = ["--recipes", "bf16,infir2", "--seeds", "1", "--steps", "400", "--", *trainer]
    process = subprocess.Popen(
        [*cli, *options], env={**os.environ, "SLOW": "0.05", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    log = out / "bf16-seed7" / "log.txt"
    deadline = time.monotonic() + 60
    while not (log.is_file() and "iteration        3/" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert record.status(out / "bf16-seed7") == "interrupted"
    rows = json.loads((out / "report.json").read_text())["recipes"]
    states = {r["folder"]: r["status"] for recipe in rows for r in recipe["runs"]}
    assert states == {"bf16-seed7": "interrupted", "infir2-seed7": "not started"}
    size = log.stat().st_size
    time.sleep(0.5)
    assert log.stat().st_size == size  # nobody writes any more


def test_killed_run_counts_as_interrupted(trainer, tmp_path):
    run.execute(members(trainer, tmp_path), QUIET)
    (tmp_path / "bf16-seed7" / "state.json").write_text('{"status": "running"}')
    assert record.status(tmp_path / "bf16-seed7") == "interrupted"
    assert record.read(tmp_path / "bf16-seed7").why == "killed"


@pytest.mark.parametrize("what", ["command", "steps", "data", "versions"])
def test_runs_that_differ_are_not_compared(what, trainer, tmp_path, monkeypatch):
    run.execute(members(trainer, tmp_path / "a", ["bf16"]), QUIET)
    extra, steps = [], 20
    if what == "command":
        extra, words = ["--lr", "2"], r"'absent' in one, '--lr 2' in the other"
    elif what == "steps":
        steps, words = 30, "20 steps in one, 30 in the other"
    elif what == "data":
        (tmp_path / "text.bin").write_bytes(b"some texT" * 100)
        words = "the data 'text' is not the same"
    else:
        monkeypatch.setenv("V", "2")
        words = "megatron is 1 in one and 2 in the other"
    other = [
        m for m in members(trainer, tmp_path / "b", steps=steps, extra=extra) if m.choice.is_fp8
    ]
    run.execute(other, QUIET)
    with pytest.raises(UserError, match=words):
        record.read_all([tmp_path / "a", tmp_path / "b"])


def test_score_command(trainer, tmp_path):
    code = "import sys; print('hello'); print('{\"exact_match\": 0.%s}' % sys.argv[1])"
    score = f"{sys.executable} -c {json.dumps(code)} {{seed}}"
    run.execute(members(trainer, tmp_path), QUIET, score=score)
    rows = result.build(record.read_all([tmp_path])).scores
    assert [(r.name, r.recipe, r.mean) for r in rows] == [
        ("exact_match", "bf16", pytest.approx(0.75)), ("exact_match", "infir2", pytest.approx(0.75)),
    ]  # fmt: skip
    assert rows[1].difference.mean == 0


def test_a_failed_score_is_shown_and_tried_again(trainer, tmp_path):
    """It stops nobody: the other runs still train and are scored."""
    code = "import sys; 1 / (sys.argv[1] != 'infir2'); print('{\"exact\": 0.5}')"
    bad = f"{sys.executable} -c {json.dumps(code)} {{recipe}}"
    run.execute(members(trainer, tmp_path, seeds=1), QUIET, score=bad)
    runs = {r.recipe: r for r in record.read_all([tmp_path])}
    assert runs["bf16"].ended_well and runs["bf16"].scores == {"exact": 0.5}
    assert runs["infir2"].status == "finished" and not runs["infir2"].ended_well
    assert "no JSON object of numbers" in runs["infir2"].why and not runs["infir2"].scores
    logs = [r.folder / "log.txt" for r in runs.values()]
    before = [log.stat().st_mtime_ns for log in logs]
    good = bad.replace("infir2", "nothing")
    run.execute(members(trainer, tmp_path, seeds=1), QUIET, score=good)
    assert all(r.ended_well for r in record.read_all([tmp_path]))
    assert [log.stat().st_mtime_ns for log in logs] == before


@pytest.mark.parametrize(
    ("needed", "gpus", "parallel", "devices", "sharing"),
    [
        (1, [], None, (None,), 1),
        (1, [], 2, (None, None), 2),
        (1, ["0"], None, (None,), 1),
        (1, ["0"], 3, (None, None, None), 3),
        (1, ["0", "1"], None, ("0", "1"), 1),
        (1, ["4", "5"], 3, ("4", "5", "4"), 2),
        (2, ["0", "1", "2", "3"], None, ("0,1", "2,3"), 1),
        (4, ["0", "1"], None, (None,), 1),
    ],
)
def test_places(needed, gpus, parallel, devices, sharing):
    assert run.places(needed, gpus, parallel) == run.Places(devices, sharing)


def test_runs_that_share_a_device_say_so(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_visible_gpus", lambda: ["0"])
    run.execute(members(trainer, tmp_path), QUIET, parallel=3)
    found = result.build(record.read_all([tmp_path]))
    assert {each.run.sharing for each in found.runs} == {3}
    assert "Up to 3 runs shared a device" in tables.sharing(found)
    with pytest.raises(UserError, match="only runs of one process can share"):
        run.places(2, ["0", "1"], 2)
    with pytest.raises(UserError, match="at least 1"):
        run.places(1, ["0"], 0)


def test_what_did_not_fit_beside_others_runs_again(trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "_visible_gpus", lambda: ["0"])
    (tmp_path / "memory").mkdir()
    monkeypatch.setenv("MEMORY", str(tmp_path / "memory"))
    run.execute(members(trainer, tmp_path / "out", seeds=1), Console(width=120), parallel=2)
    found = record.read_all([tmp_path / "out"])
    assert [each.status for each in found] == ["finished", "finished"]
    assert {each.sharing for each in found} == {1}
    said = capsys.readouterr().out
    assert "2 runs ran out of memory beside others: again, 1 at a time" in said
    for each in found:
        assert "CUDA out of memory" in (each.folder / "log.txt").read_text()


@pytest.mark.parametrize("flag", ["--load", "--sft-data"])
def test_another_start_or_other_samples_are_not_compared(flag, trainer, tmp_path):
    """Not the folder's name: what lies in it."""
    for where, words in (("a", "one"), ("b", "two"), ("c", "one")):
        (tmp_path / where / "given").mkdir(parents=True)
        (tmp_path / where / "given" / "file").write_text(words)
        extra = [flag, str(tmp_path / where / "given")]
        recipe = "bf16" if where == "a" else "infir2"
        only = [
            m for m in members(trainer, tmp_path / where, extra=extra) if m.choice.label == recipe
        ]
        run.execute(only, QUIET)
        # Beside an index of packed samples lies where they came from, which is no difference.
        (tmp_path / where / "packed").mkdir()
        (tmp_path / where / "packed" / "index.json").write_text('{"shards": []}')
        (tmp_path / where / "packed" / "shard.json").write_text(where)
    record.read_all([tmp_path / "a", tmp_path / "c"])
    digests = [fingerprint.of_inputs(["x", flag, str(tmp_path / w / "packed")]) for w in ("a", "b")]
    assert digests[0] == digests[1] and digests[0]["packed"]["bytes"] == 14
    with pytest.raises(UserError, match=r"the data 'given' is not the same \(3 and 3 bytes\)"):
        record.read_all([tmp_path / "a", tmp_path / "b"])


def test_an_interrupted_score_is_ended(trainer, tmp_path):
    planned = members(trainer, tmp_path, recipes=["bf16"], seeds=1)
    started = tmp_path / "started"
    code = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    score = f"{sys.executable} -c {json.dumps(code)}"

    def interrupt():
        while not (started.exists() and started.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run.execute(planned, QUIET, score=score)
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    found = record.read(planned[0].folder)
    assert found.ended_well and not found.scores  # it is scored when the command is given again


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8))
def test_interval_is_students(values):
    found = verdict.interval(values)
    assert found.low <= found.mean <= found.high
    # Two values: t is 12.706, and the error half their distance.
    if len(values) == 2:
        half = 12.7062047 * abs(values[0] - values[1]) / 2
        assert found.high - found.mean == pytest.approx(half, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)],
)
def test_quantiles_are_the_printed_tables(freedom, t):
    assert verdict.t_quantile(0.975, freedom) == pytest.approx(t, abs=1e-5)


def gap(low, high, count=3):
    return verdict.Interval((low + high) / 2, low, high, count)


@pytest.mark.parametrize(
    ("found", "changes", "kind"),
    [
        (gap(-0.001, 0.002), {}, "lossless"),
        (gap(-0.02, -0.01), {}, "lossless"),
        (gap(-0.001, 0.0026), {}, "inconclusive"),
        (gap(0.003, 0.004), {}, "not lossless"),
        (gap(-0.001, 0.002), {"steps": 199}, "inconclusive"),
        (gap(0.003, 0.004), {"steps": 10}, "not lossless"),
        (gap(-math.inf, math.inf, 1), {}, "inconclusive"),
        (gap(-0.001, 0.002), {"gemms": 0}, "inconclusive"),
        (gap(-0.001, 0.002, 2), {"trained_alike": False}, "inconclusive"),
        (gap(-0.001, 0.002), {"diverged": 1}, "not lossless"),
        (None, {}, "inconclusive"),
    ],
)  # fmt: skip
def test_rule(found, changes, kind):
    given_ = {"steps": 1000, "planned": 3, "diverged": 0, "gemms": 48, **changes}
    assert verdict.judge(found, **given_).kind == kind


def test_a_control_that_passes_spoils_every_lossless(trainer, tmp_path):
    """The fake trainer trains controls as well as infir2: nothing may be called lossless then."""
    recipes = ["bf16", "infir2", "control-1bit"]
    run.execute(members(trainer, tmp_path / "a", recipes, steps=200), QUIET, parallel=2)
    spoiled = result.build(record.read_all([tmp_path / "a"]))
    assert spoiled.recipes[1].verdict.kind == "inconclusive"
    assert "did NOT fail" in spoiled.control_note
    run.execute(members(trainer, tmp_path / "b", recipes[:2], steps=200), QUIET, parallel=2)
    assert result.build(record.read_all([tmp_path / "b"])).recipes[1].verdict.kind == "lossless"


def test_report_without_a_baseline_or_runs(trainer, tmp_path):
    with pytest.raises(UserError, match=r"no member\.json"):
        record.read_all([tmp_path])
    only = [m for m in members(trainer, tmp_path / "a") if m.choice.is_fp8]
    run.execute(only, QUIET)
    with pytest.raises(UserError, match="no bf16 run"):
        result.build(record.read_all([tmp_path / "a"]))
