"""Decay branches through Megatron's own loop on the CPU: schedule, optimizer and data continue.

The corpora are so small that the runs pass over them two and a half times, and the branches cross the
boundary into the last pass, where Megatron's shuffle depends on the number of samples asked for.
"""

from __future__ import annotations

import collections
import itertools
import json
import shutil
from pathlib import Path

import pytest
from conftest import NATIVE_SCHEDULE, ROOT

from megatron_fp8_ext.checkpoint import sample_plan
from megatron_fp8_ext.schedule import WSD

pytestmark = [pytest.mark.megatron, pytest.mark.slow]
OBSERVED = Path(__file__).with_name("observed.py")
SEQ, BATCH = 16, 4
SMALL = ["--seq-length", str(SEQ), "--max-position-embeddings", str(SEQ), "--split", "100,0,0"]
DIST = "--use-distributed-optimizer"
RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"
# 31 iterations of 4 samples = 124 = 2.5 passes over 50 samples.
WARMUP, STABLE, DECAY = 2, 22, 7
SCHEDULE = (
    f"--lr-schedule wsd --wsd-warmup-iters {WARMUP} --wsd-stable-iters {STABLE} "
    f"--wsd-decay-iters {DECAY}"
).split()


@pytest.fixture(scope="session")
def go(train, small_corpora):
    """Train on the small corpora; returns the outcome and the samples it consumed, in order."""
    numbers = itertools.count()

    def start(*flags, data=("a",), **options):
        log = small_corpora / f"samples-{next(numbers)}"
        paths = [
            part if part.replace(".", "").isdigit() else str(small_corpora / part) for part in data
        ]
        outcome = train(
            *SMALL, "--data-path", *paths, "--data-cache-path", str(small_corpora / "cache"), *flags,
            script=OBSERVED, SAMPLES_LOG=str(log), without=NATIVE_SCHEDULE, **options,
        )  # fmt: skip
        rows = []
        for file in sorted(small_corpora.glob(f"{log.name}.*")):
            rows.append([json.loads(line) for line in file.read_text().splitlines()])
        return outcome, rows

    return start


def flat(rows):
    """The samples of a run on one rank, hashable."""
    return [
        (row["corpus"], row["sample"], tuple(row["documents"]), tuple(row["span"]))
        for row in rows[0]
        if row["split"] == "train"
    ]


@pytest.fixture(scope="module")
def stable(go, tmp_path_factory):
    """(folder, outcome, samples) of an uninterrupted BF16 run that saves at every other iteration."""
    folder = tmp_path_factory.mktemp("stable")
    outcome, rows = go(
        DIST, *SCHEDULE, "--lr", "1e-3", "--min-lr", "1e-5", "--save", str(folder),
        "--save-interval", "2",
    )  # fmt: skip
    return folder, outcome, flat(rows)


def test_the_plan_lies_beside_every_checkpoint(stable):
    folder, outcome, samples = stable
    total = WARMUP + STABLE + DECAY
    assert len(outcome.iterations) == total and len(samples) == total * BATCH
    for iteration in range(2, total, 2):
        plan = sample_plan.read(folder / f"iter_{iteration:07d}")
        assert (plan.planned_samples, plan.available_samples) == (total * BATCH, 150)
        assert [(c.documents, c.tokens) for c in plan.corpora] == [(13, 804)]


def test_samples_are_unique_and_cover_each_pass(stable):
    _, _, samples = stable
    assert len(set(samples)) == len(samples)
    tokens = collections.Counter()
    for _, number, _, _ in samples:
        # the sample's tokens, in the stream of all passes
        tokens.update(range(number * SEQ, (number + 1) * SEQ))
    # Megatron shuffles the passes before the last among each other: both are complete.
    assert set(range(100 * SEQ)) <= set(tokens) and max(tokens.values()) == 1


def test_a_branch_at_the_planned_decay_is_the_run_itself(go, stable, tmp_path):
    """Every printed digit, every sample, though it is killed on the way and crosses into the last pass."""
    folder, whole, samples = stable
    start = WARMUP + STABLE
    command = [
        DIST, "--wsd-decay-from", f"{folder}/iter_{start:07d}", "--wsd-decay-iters", str(DECAY),
        "--save", str(tmp_path / "branch"), "--save-interval", "2",
    ]  # fmt: skip
    killed, first = go(*command, KILL_BEFORE_STEP="30", ok=False)
    assert killed.code == -9
    resumed, second = go(*command)
    assert flat(first)[: 4 * BATCH] + flat(second) == samples[start * BATCH :]
    iterations = [*(i for i in killed.iterations if i.number <= 28), *resumed.iterations]
    assert [i.number for i in iterations] == list(range(start + 1, start + DECAY + 1))
    for ours, theirs in zip(iterations, whole.iterations[start:], strict=True):
        assert (ours.learning_rate, ours.grad_norm) == (theirs.learning_rate, theirs.grad_norm)
        if ours.number not in (26, 30):  # logged as the mean of the first two after a start
            assert ours.loss == theirs.loss
    assert sample_plan.read(tmp_path / "branch" / "iter_0000031").planned_samples == 124
    assert not list(folder.glob("*branch*"))
    again, _ = go(*command)
    assert "is finished, at iteration 31" in again.said[-1] and not again.iterations
    other, _ = go(*command, "--min-lr", "0", ok=False)
    assert other.code == 2 and "holds the branch with --min-lr 1e-05" in other.said[-1]


def test_data_that_ends_too_early_stops_a_branch_of_a_stock_run(go, stable, tmp_path):
    """Its checkpoint does not say how long the data lasts: that shows when it is built."""
    stock = tmp_path / "stock" / "iter_0000024"
    shutil.copytree(stable[0] / stock.name, stock)
    (stock / sample_plan.FILE).unlink()
    outcome, _ = go(
        DIST, "--wsd-decay-from", str(stock), "--wsd-decay-iters", "14", "--save",
        str(tmp_path / "branch"), ok=False,
    )  # fmt: skip
    assert outcome.code == 2 and not outcome.iterations and "Traceback" not in outcome.output
    assert "ends at 150: decay over at most 13 iterations" in outcome.said[-1]


# Checkpoints that the stable run of the other tests has not: iteration -> what else is said when saving.
OTHERS = {1: [], 3: ["--no-save-optim"]}


@pytest.mark.parametrize(
    ("at", "text", "words"),
    [
        (1, "--wsd-decay-iters 3", "is inside the warmup, which ends at iteration 2: give a later"),
        (3, "--wsd-decay-iters 3", "holds no optimizer state (it was saved with --no-save-optim"),
        (14, "--wsd-decay-iters 3", "half-written: it has no metadata.json, which is written last"),
        (19, "--wsd-decay-iters 3", "half-written: it is not there; complete here: iterations"),
        (20, "--wsd-decay-iters 18", "ends at 150: decay over at most 17 iterations"),
        (
            20,
            "--wsd-decay-iters 3 --train-iters 31",
            "--train-iters 31 contradicts --wsd-decay-from",
        ),
        (26, "--wsd-decay-iters 3", "is inside the decay, which began at iteration 24: give that"),
    ],
)
def test_what_cannot_be_branched_is_one_line(go, stable, tmp_path, at, text, words):
    """Said by the training command itself, before it reads data or writes anything."""
    root = stable[0]
    if at in OTHERS:
        root = tmp_path / "stable"
        end = ["--save-interval", str(at), "--exit-interval", str(at)]
        go(DIST, *SCHEDULE, "--lr", "1e-3", "--save", str(root), *end, *OTHERS[at])
    elif at == 14:
        root = tmp_path / "stable"
        shutil.copytree(stable[0], root)
        (root / "iter_0000014" / "metadata.json").unlink()
    outcome, rows = go(
        DIST, "--wsd-decay-from", str(root / f"iter_{at:07d}"), *text.split(), "--save",
        str(tmp_path / "branch"), ok=False,
    )  # fmt: skip
    assert outcome.code == 2 and not outcome.iterations and not rows
    (line,) = (x for x in outcome.said if "error" in x)
    assert words in line and "Traceback" not in outcome.output
    assert not (tmp_path / "branch").exists()


@pytest.mark.parametrize(
    ("start", "length", "flags", "rates"),
    [
        (2, 4, "--min-lr 4e-4", (1e-3, 4e-4)),
        (14, 5, "--lr 7e-4 --min-lr 2e-5 --wsd-decay-style linear", (7e-4, 2e-5)),
        (8, 3, "--lr 2e-3 --fp8-recipe infir2", (2e-3, 1e-5)),
    ],
    ids=["end of the warmup, other min-lr", "middle, named jump", "jump up, and on in infir2"],
)
def test_changed_rates_reach_every_parameter(go, stable, tmp_path, start, length, flags, rates):
    folder, _, samples = stable
    outcome, rows = go(
        DIST, "--wsd-decay-from", str(folder), "--ckpt-step", str(start), "--wsd-decay-iters",
        str(length), "--save", str(tmp_path / "branch"), *flags.split(),
    )  # fmt: skip
    wsd = WSD(
        lr=rates[0], min_lr=rates[1], warmup_samples=WARMUP * BATCH, decay_samples=length * BATCH,
        total_samples=(start + length) * BATCH, decay_style="linear" if "linear" in flags else "cosine",
    )  # fmt: skip
    logged = {i.number: i.learning_rate for i in outcome.iterations}
    assert logged == {
        n: pytest.approx(wsd.at(n * BATCH), rel=1e-6) for n in range(start + 1, start + length + 1)
    }
    assert flat(rows) == samples[start * BATCH : (start + length) * BATCH]
    assert any("JUMPS" in line for line in outcome.said) == (rates[0] != 1e-3)


def test_a_blend_of_two_goes_on_in_its_order(go, tmp_path):
    """0.6 a + 0.4 b; the branch enters b's last pass, and ends where the long run ends."""
    data = ("0.6", "a", "0.4", "b")
    _, rows = go(
        DIST, *SCHEDULE, "--lr", "1e-3", "--save", str(tmp_path / "stable"), "--save-interval", "21",
        data=data,
    )  # fmt: skip
    samples = flat(rows)
    assert len(set(samples)) == len(samples) == 124
    parts = collections.Counter(corpus for corpus, *_ in samples)
    assert parts["b"] > 31 and {corpus for corpus, *_ in samples[84:]} == {"a", "b"}
    # b holds 31 samples a pass: the branch point is inside its first one, the end in the second.
    assert sum(corpus == "b" for corpus, *_ in samples[:76]) < 31
    _, rows = go(
        DIST, "--wsd-decay-from", str(tmp_path / "stable" / "iter_0000021"), "--wsd-decay-iters", "10",
        "--save", str(tmp_path / "branch"), data=data,
    )  # fmt: skip
    assert flat(rows) == samples[84:]


def batches(rows, count):
    """The samples of each iteration, as a set: every rank takes its share."""
    each = BATCH // len(rows)
    ranks = [flat([rank]) for rank in rows]
    return [
        {sample for rank in ranks for sample in rank[n * each : (n + 1) * each]}
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("recipe", "start", "ranks"),
    [("infir2", 24, (1, 2)), ("bf16", 9, (2, 1))],
    ids=["infir2, one rank to two", "bf16, two ranks to one"],
)
def test_another_number_of_data_parallel_ranks(go, tmp_path, recipe, start, ranks):
    """Saved in the fully reshardable layout: the same batches and rates, losses up to rounding."""
    flags = ["--fp8-recipe", recipe, DIST, RESHARDABLE]
    save = ["--save", str(tmp_path / "stable"), "--save-interval", str(start)]
    whole, rows = go(*flags, *SCHEDULE, "--lr", "1e-3", *save, processes=ranks[0])
    wanted = batches(rows, WARMUP + STABLE + DECAY)[start : start + DECAY]

    def branch(name, processes):
        return go(
            *flags, "--wsd-decay-from", str(tmp_path / "stable" / f"iter_{start:07d}"),
            "--wsd-decay-iters", str(DECAY), "--save", str(tmp_path / name), processes=processes,
        )  # fmt: skip

    same, rows = branch("same", ranks[0])
    assert batches(rows, DECAY) == wanted
    if start == WARMUP + STABLE:  # it is the run itself
        for ours, theirs in zip(same.iterations, whole.iterations[start:], strict=True):
            assert (ours.learning_rate, ours.grad_norm) == (theirs.learning_rate, theirs.grad_norm)
    other, rows = branch("other", ranks[1])
    assert len(rows) == ranks[1] and batches(rows, DECAY) == wanted
    assert bool(other.casts) == (recipe == "infir2")
    assert [i.number for i in other.iterations] == list(range(start + 1, start + DECAY + 1))
    for ours, theirs in zip(other.iterations, same.iterations, strict=True):
        assert ours.learning_rate == theirs.learning_rate
        assert ours.loss == pytest.approx(theirs.loss, rel=2e-3)


def test_older_megatrons(wheel, go, tmp_path):
    """0.17 and 0.18 keep arguments and schedule in common.pt, and would ignore the new rates."""
    version, path = wheel
    if version.startswith("0.19"):
        pytest.skip("the version of every other test here")
    env = {"PYTHONPATH": f"{path}:{ROOT}"}
    stable = str(tmp_path / "stable")
    # A stock run: native flags, no plan beside its checkpoint.
    native = "--train-iters 5 --lr-decay-style constant --lr-warmup-iters 1 --lr 1e-3".split()
    go(DIST, *native, "--save", stable, "--save-interval", "3", "--exit-interval", "3", **env)
    (tmp_path / "stable" / "iter_0000003" / sample_plan.FILE).unlink()
    outcome, _ = go(
        DIST, "--wsd-decay-from", stable, "--wsd-decay-iters", "2", "--lr", "5e-4", "--min-lr", "1e-4",
        "--save", str(tmp_path / "branch"), **env,
    )  # fmt: skip
    assert [i.learning_rate for i in outcome.iterations] == [
        pytest.approx(3e-4),
        pytest.approx(1e-4),
    ]
