"""schedule_flags.expand: our schedule flags become Megatron's, and every contradiction has both names."""

from __future__ import annotations

import checkpoints
import pytest

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import arguments, branch_folder, flags, schedule_flags

WSD = ["--lr-schedule", "wsd"]
SIZES = ["--global-batch-size", "8", "--seq-length", "16"]


def expand(text: str):
    return schedule_flags.expand([*WSD, *text.split()])


def values(out, *names):
    return tuple(arguments.value(out.argv, name) for name in names)


ITERS = ("--train-iters", "--lr-warmup-iters", "--lr-wsd-decay-iters", "--lr-decay-iters")
SAMPLES = ("--train-samples", "--lr-warmup-samples", "--lr-wsd-decay-samples", "--lr-decay-samples")


@pytest.mark.parametrize(
    ("text", "native"),
    [
        # InfiR2's own lengths
        ("--wsd-warmup-iters 5000 --wsd-stable-iters 30000 --wsd-decay-iters 5000", (40000, 5000, 5000)),
        ("--wsd-warmup-iters 5000 --train-iters 40000 --wsd-decay-iters 5000", (40000, 5000, 5000)),
        ("--lr-warmup-iters 5 --train-iters 40 --lr-wsd-decay-iters 6", (40, 5, 6)),
        ("--wsd-stable-iters 30 --train-iters 40 --wsd-warmup-iters 4", (40, 4, 6)),
        ("--train-iters 40", (40, 0, 0)),
        ("--train-iters 40 --wsd-decay-fraction 0.1", (40, 0, 4)),
        ("--wsd-stable-iters 36 --wsd-decay-fraction 0.1", (40, 0, 4)),
        ("--train-iters 33 --wsd-warmup-fraction .1 --wsd-stable-fraction .8 --wsd-decay-fraction .1",
         (33, 3, 3)),
        # 1000 tokens of 16 x 8 are 7.8 iterations: whole ones
        ("--global-batch-size 8 --seq-length 16 --wsd-stable-tokens 1000 --wsd-decay-iters 2", (10, 0, 2)),
    ],
)  # fmt: skip
def test_lengths_in_iterations(text, native):
    out = expand(text)
    total, warmup, decay = map(str, native)
    assert values(out, *ITERS) == (total, warmup, decay, total)
    assert values(out, "--lr-decay-style", "--lr-wsd-decay-style") == ("WSD", "cosine")
    assert not any(token.startswith(("--wsd", "--lr-schedule")) for token in out.argv)
    assert schedule_flags.expand(out.argv) == schedule_flags.Scheduled(argv=out.argv)


@pytest.mark.parametrize(
    ("text", "native"),
    [
        ("--train-samples 400 --wsd-warmup-samples 10 --wsd-decay-fraction 0.25", (400, 10, 100)),
        ("--train-samples 400 --wsd-decay-tokens 100 --seq-length 16", (400, 0, 7)),
        ("--wsd-stable-samples 90 --wsd-decay-iters 2 --global-batch-size 8", (106, 0, 16)),
        ("--train-samples 400 --rampup-batch-size 1 1 10 --wsd-decay-samples 8", (400, 0, 8)),
    ],
)
def test_lengths_in_samples(text, native):
    out = expand(text)
    total, warmup, decay = map(str, native)
    assert values(out, *SAMPLES) == (total, warmup, decay, total)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the length of the run is not known: add --train-iters"),
        ("--wsd-warmup-iters 3", "the length of the run is not known"),
        ("--train-iters 9 --wsd-warmup-iters 5 --wsd-decay-iters 5", "longer than the whole run of 9"),
        ("--train-iters 9 --wsd-warmup-iters 1 --wsd-stable-iters 1 --wsd-decay-iters 1",
         "--train-iters 9 contradicts --wsd-warmup-iters 1, --wsd-stable-iters 1, --wsd-decay-iters 1"),
        ("--train-iters 9 --wsd-decay-iters 2 --wsd-decay-fraction 0.1", "contradicts --wsd-decay-fraction"),
        ("--train-iters 9 --wsd-warmup-iters 2 --lr-warmup-iters 3", "contradicts --lr-warmup-iters 3"),
        ("--train-iters 9 --lr-decay-iters 8", "--lr-decay-iters 8 contradicts --lr-schedule wsd"),
        ("--train-iters 9 --lr-decay-style cosine", "--lr-decay-style cosine contradicts --lr-schedule wsd"),
        ("--train-iters 9 --wsd-decay-style linear --lr-wsd-decay-style cosine", "contradicts"),
        ("--train-iters 9 --wsd-decay-style square", "unknown --wsd-decay-style 'square'"),
        ("--train-iters x", "--train-iters x: not a number"),
        ("--train-iters 9 --wsd-decay-iters 1.5", "--wsd-decay-iters 1.5: not a whole number"),
        ("--train-iters 9 --wsd-decay-iters=-1", "no possible length"),
        ("--train-iters 9 --wsd-decay-fraction 1.5", "no possible length"),
        ("--train-iters 9 --wsd-decay-iters", "--wsd-decay-iters needs a number"),
        ("--train-iters 9 --wsd-decay-tokens 64", "--wsd-decay-tokens 64 needs --seq-length"),
        ("--train-iters 9 --wsd-decay-samples 8", "--train-iters 9 needs --global-batch-size"),
        ("--train-iters 9 --rampup-batch-size 1 1 10", "--train-iters 9 contradicts --rampup-batch-size"),
        ("--wsd-stable-fraction 0.5 --wsd-decay-fraction 0.5", "fractions alone give no length"),
        ("--train-iters 9 --yaml-cfg x", "contradicts --yaml-cfg"),
        ("--train-iters 9 --wsd-planned-samples 3", "--wsd-planned-samples needs --wsd-decay-from"),
        ("--train-iters 9 --global-batch-size 0 --wsd-decay-samples 8", "not a positive number"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(text, words):
    with pytest.raises(UserError) as caught:
        expand(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_names_and_missing_partners():
    with pytest.raises(UserError, match="did you mean 'wsd'"):
        schedule_flags.expand(["--lr-schedule", "wsdd"])
    with pytest.raises(UserError, match="needs a name: wsd"):
        schedule_flags.expand(["--lr-schedule"])
    with pytest.raises(UserError, match="--wsd-decay-iters needs --lr-schedule wsd"):
        schedule_flags.expand(["--wsd-decay-iters", "3"])
    assert schedule_flags.expand(["--lr", "1"]).argv == ("--lr", "1")


def test_the_schedule_goes_with_and_without_a_recipe():
    out = schedule_flags.expand([*WSD, "--train-iters", "9", "--bf16", "--fp8-recipe", "infir2"])
    native = flags.expand(out.argv, flags.Facts(options=frozenset())).argv
    assert "--train-iters" in native and "blockwise" in native
    assert flags.ours([*WSD], {}) and flags.ours(["--wsd-decay-from=x"], {})
    assert not flags.ours(["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "3"], {})


# Branches ------------------------------------------------------------------------------------


@pytest.fixture
def stable(tmp_path):
    root = tmp_path / "stable"
    for iteration in (1, 40, 80, 81):
        checkpoints.write(root, iteration)
    return root


def branch(stable, text, at=40, **save):
    folder = save.get("save", stable.parent / "branch")
    argv = ["--wsd-decay-from", str(stable / f"iter_{at:07d}"), *text.split()]
    if folder is not None:
        argv += ["--save", str(folder)]
    located = branch_folder.locate(argv)
    return schedule_flags.expand(argv, located.point, located.started)


def test_a_branch_in_native_flags(stable):
    out = branch(stable, "--wsd-decay-iters 10")
    assert values(out, "--load", "--ckpt-step") == (str(stable), "40")
    assert values(out, *ITERS) == ("50", "2", "10", "50")
    assert values(out, "--lr", "--min-lr", "--global-batch-size") == ("0.001", "1e-05", "4")
    assert values(out, "--lr-wsd-decay-style") == ("linear",)  # what the stable run planned
    assert out.argv.count("--override-opt_param-scheduler") == 1
    assert out.branch.end_samples == 200
    assert out.branch.schedule.at(160) == pytest.approx(1e-3)
    assert out.branch.schedule.at(200) == 1e-5
    assert len(out.notes) == 1


def test_until_it_is_loaded_a_branch_has_the_stable_rates(stable):
    out = branch(stable, "--wsd-decay-fraction 0.2 --lr 5e-4 --min-lr 0 --wsd-decay-style cosine")
    assert out.branch.decay_iters == 10  # a fifth of 50
    assert values(out, "--lr", "--min-lr") == ("0.001", "1e-05")
    assert "JUMPS from 0.001" in out.notes[1]
    again = schedule_flags.expand(
        ["--wsd-decay-from", "x", "--wsd-decay-iters", "10", "--lr", "5e-4", "--save", "new"],
        out.branch.point,
        started=True,
    )
    assert values(again, "--load", "--ckpt-step", "--lr") == ("new", None, "0.0005")


def test_a_run_by_samples_is_branched_by_samples(tmp_path):
    root = tmp_path / "stable"
    by = {
        "train_samples": 400,
        "train_iters": 100,
        "lr_wsd_decay_iters": None,
        "lr_wsd_decay_samples": 80,
    }
    checkpoints.write(root, 40, by)
    out = branch(root, "--wsd-decay-tokens 650")
    assert values(out, *SAMPLES) == ("204", "8", "44", "204")  # 10.2 iterations: 11
    checkpoints.write(
        tmp_path / "ramped",
        40,
        {**by, "rampup_batch_size": [1, 1, 9], "consumed_train_samples": 150},
    )
    assert branch(tmp_path / "ramped", "--wsd-decay-iters 5").branch.end_samples == 170


def test_a_constant_run_is_stable_to_its_end(tmp_path):
    checkpoints.write(tmp_path / "stable", 95, scheduler={"lr_decay_style": "constant"})
    assert branch(tmp_path / "stable", "--wsd-decay-iters 5", at=95).branch.decay_style == "cosine"


@pytest.mark.parametrize(
    ("at", "text", "words"),
    [
        (1, "--wsd-decay-iters 5", "is inside the warmup, which ends at iteration 2: give a later"),
        (81, "--wsd-decay-iters 5", "is inside the decay, which began at iteration 80"),
        (39, "--wsd-decay-iters 5", "half-written: it is not there; complete here: iterations 1, 40"),
        (40, "", "needs the length of the decay: add --wsd-decay-iters N"),
        (40, "--wsd-decay-iters 0", "is no iteration at all"),
        (40, "--wsd-decay-fraction 1", "lies between 0 and 1"),
        (40, "--wsd-decay-iters 5 --train-iters 44", "--train-iters 44 contradicts --wsd-decay-from"),
        (40, "--wsd-decay-iters 5 --train-samples 44", "--train-samples 44 contradicts"),
        (40, "--wsd-decay-iters 5 --lr-decay-style cosine", "--lr-decay-style cosine contradicts"),
        (40, "--wsd-decay-iters 5 --lr-decay-iters 44", "--lr-decay-iters 44 contradicts"),
        (40, "--wsd-decay-iters 5 --lr-wsd-decay-iters 6", "contradicts --lr-wsd-decay-iters 6"),
        (40, "--wsd-decay-iters 5 --lr-warmup-iters 3", "a branch has no warmup"),
        (40, "--wsd-decay-iters 5 --global-batch-size 8", "--global-batch-size 8 contradicts"),
        (40, "--wsd-decay-iters 5 --no-load-optim", "contradicts --no-load-optim"),
        (40, "--wsd-decay-iters 5 --finetune", "contradicts --finetune"),
        (40, "--wsd-decay-iters 5 --use-checkpoint-opt_param-scheduler", "contradicts --use-checkpoint"),
        (40, "--wsd-decay-iters 5 --wsd-stable-iters 3", "contradicts --wsd-stable-iters"),
        (40, "--wsd-decay-iters 5 --load elsewhere", "contradicts --load elsewhere"),
        (40, "--wsd-decay-iters 5 --ckpt-step 80", "--ckpt-step 80 contradicts"),
        (40, "--wsd-decay-iters 5 --min-lr 1", "--min-lr 1 is above the learning rate 0.001"),
        (40, "--wsd-decay-iters 5 --wsd-planned-samples x", "not a number"),
    ],
)  # fmt: skip
def test_a_branch_that_cannot_be_is_one_line(stable, at, text, words):
    with pytest.raises(UserError) as caught:
        branch(stable, text, at)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (stable.parent / "branch").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": False}, "holds no optimizer state"),
        ({"scheduler": {"lr_decay_style": "cosine"}}, "has no stable phase"),
        ({"args": {"consumed_train_samples": 150}}, "it changed during the stable run"),
        ({"args": {"seq_length": None}}, "does not hold the run's arguments (seq_length missing)"),
        ({"args": {"train_iters": None}}, "add --wsd-planned-samples N"),
    ],
    ids=str,
)
def test_checkpoints_that_cannot_be_branched(tmp_path, changes, words):
    checkpoints.write(tmp_path / "stable", 40, **changes)
    with pytest.raises(UserError) as caught:
        branch(tmp_path / "stable", "--wsd-decay-iters 5")
    assert words in str(caught.value)


def test_half_written_checkpoints_are_not_branched(stable):
    (stable / "iter_0000040" / "metadata.json").unlink()
    with pytest.raises(UserError, match=r"half-written: it has no metadata\.json"):
        branch(stable, "--wsd-decay-iters 5")
    (stable / "latest_checkpointed_iteration.txt").write_text("")
    with pytest.raises(UserError, match="holds no iteration, and Megatron stops on that"):
        branch(stable, "--wsd-decay-iters 5", at=80)


def test_the_folders_of_a_branch(stable, tmp_path):
    with pytest.raises(UserError, match="needs --save FOLDER"):
        branch(stable, "--wsd-decay-iters 5", save=None)
    with pytest.raises(UserError, match="is the stable run's folder"):
        branch(stable, "--wsd-decay-iters 5", save=stable / ".." / "stable")
    checkpoints.write(tmp_path / "other", 3)
    with pytest.raises(UserError, match="holds checkpoints of another run"):
        branch(stable, "--wsd-decay-iters 5", save=tmp_path / "other")


def test_the_same_command_again_finds_its_branch(stable):
    save = stable.parent / "branch"
    made = branch(stable, "--wsd-decay-iters 5").branch
    branch_folder.write_record(save, made)
    assert branch_folder.read_record(save) == made
    # Killed before its first checkpoint, and the stable run has gone on meanwhile.
    argv = ["--wsd-decay-from", str(stable), "--wsd-decay-iters", "5", "--save", str(save)]
    assert branch_folder.locate(argv) == branch_folder.Located(made.point)
    checkpoints.write(save, 42)
    assert branch_folder.locate(argv) == branch_folder.Located(made.point, started=True)
    for folder in stable.iterdir():  # the stable run's checkpoints are not needed any more
        folder.rename(stable.parent / folder.name)
    assert branch_folder.locate(argv).started
    for change, words in {
        "--wsd-decay-iters 6": "with --wsd-decay-iters 5, the command says 6",
        "--lr 1": "with --lr 0.001, the command says 1.0",
    }.items():
        with pytest.raises(UserError, match=words):
            branch_folder.locate([*argv, *change.split()])
    argv[1] = str(stable / "iter_0000080")
    with pytest.raises(UserError, match=r"holds the branch from .*iter_0000040, not from"):
        branch_folder.locate(argv)


def test_planned_samples_are_derived_recorded_or_asked_for(stable, tmp_path):
    from megatron_fp8_ext.checkpoint.sample_plan import SamplePlan

    assert branch(stable, "--wsd-decay-iters 5").branch.point.planned_samples == 400
    asked = branch(stable, "--wsd-decay-iters 5 --wsd-planned-samples 900")
    assert asked.branch.point.planned_samples == 900
    SamplePlan(planned_samples=700, available_samples=800).write(stable / "iter_0000040")
    recorded = branch(stable, "--wsd-decay-iters 5").branch.point
    assert (recorded.planned_samples, recorded.available_samples) == (700, 800)
    with pytest.raises(UserError, match="says 700: drop the flag"):
        branch(stable, "--wsd-decay-iters 5 --wsd-planned-samples 900")
