"""The loop as a user starts it: our launcher, slime's train.py, Ray, Megatron, and a rollout server over HTTP.

python -m rl_loop.loop OUT --sft FOLDER [--seed 1] [--lr 5e-5] [--rollouts 60] [--recipe infir2-rl] [--served fp32]

Of slime v0.3 everything runs unmodified: train.py, its parser, RolloutManager, data source, `generate_rollout`, reward
path, GRPO, the Megatron actor, loss, checkpoints, and the weight push (`--update-weight-transport disk`: FP8 files of
our cast, loaded by the server). Not slime's: the rollout server (server.py stands in for SGLang and its router), and on
a machine without a GPU the accelerator called `cpu` (on_cpu/), one pretended GPU for Ray's scheduler, gloo for NCCL, and
this package's emulation for FP8 GEMMs. With `--device cuda` training is TransformerEngine's on a real GPU.

OUT gets held_out_rewards.jsonl (one line an evaluation), run.log, server.log and tensorboard/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent
DIFFERENCE = re.compile(
    r"rollout (\d+): train/rollout KL (\S+), log-probability difference mean (\S+) max (\S+)"
)


@dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
        sft: BF16 checkpoint folder to start from.
        seed: of prompts' order and of sampling.
        lr: learning rate, constant.
        rollouts: steps.
        recipe: of training.
        served: scale format of the served checkpoint, fp32 or e8m0.
        fault: of the server, see server.py.
        after: pushes before the fault.
        save_interval: steps between checkpoints; None for none.
        eval_interval: steps between evaluations on the held-out problems.
        device: cpu or cuda.
        limit: --max-train-rollout-diff; None for the default.
        extra: more flags of slime.
    """

    sft: Path
    seed: int = 1
    lr: float = 5e-5
    rollouts: int = 60
    recipe: str = "infir2-rl"
    served: str = "fp32"
    fault: str = "none"
    after: int = 0
    save_interval: int | None = None
    eval_interval: int = 60
    device: str = "cpu"
    limit: float | None = None
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a run left.

    Attributes:
        code: exit status of the launcher.
        log: everything it printed.
        held_out: rewards of the held-out problems, by evaluation: `{rollout: [reward, ...]}`.
        differences: (KL, mean, max) of the log-probabilities, by rollout.
    """

    code: int
    log: str
    held_out: dict[int, list[float]]
    differences: dict[int, tuple[float, float, float]]


def flags(settings: Settings, out: Path, port: int) -> list[str]:
    """Return the command after train.py."""
    model = (
        "--num-layers 2 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 2 "
        "--group-query-attention --num-query-groups 1 --kv-channels 128 --add-qkv-bias --disable-bias-linear "
        "--swiglu --normalization RMSNorm --norm-epsilon 1e-6 --use-rotary-position-embeddings "
        "--rotary-base 10000 --vocab-size 128 --untie-embeddings-and-output-weights --seq-length 64 "
        "--spec rl_loop.layers spec --max-position-embeddings 64 --micro-batch-size 1 --attention-dropout 0 --hidden-dropout 0"
    )
    where = (
        f"--hf-checkpoint {out / 'served'} --ref-load {settings.sft} --prompt-data {out / 'train.jsonl'} "
        f"--eval-prompt-data sums {out / 'held_out.jsonl'} --input-key prompt --label-key label "
        f"--rollout-external-engine-addrs 127.0.0.1:{port} --sglang-router-ip 127.0.0.1 "
        f"--sglang-router-port {port} --update-weight-mode full --update-weight-transport disk "
        f"--update-weight-disk-dir {out / 'push'} --actor-num-nodes 1 --actor-num-gpus-per-node 1 "
        "--use-tensorboard --tb-project-name rl --tb-experiment-name loop"
    )
    training = (
        f"--num-rollout {settings.rollouts} --rollout-batch-size 16 --n-samples-per-prompt 8 "
        "--global-batch-size 128 --rollout-shuffle --rollout-max-response-len 5 --rollout-temperature 1.0 "
        "--custom-rm-path rl_loop.arithmetic.reward --advantage-estimator grpo --eps-clip 0.2 "
        "--eps-clip-high 0.28 --use-tis --entropy-coef 0 --use-dynamic-batch-size --max-tokens-per-gpu 2048 "
        f"--optimizer adam --lr {settings.lr} --lr-decay-style constant --weight-decay 0 --adam-beta2 0.98 "
        f"--clip-grad 1.0 --accumulate-allreduce-grads-in-fp32 --rollout-seed {settings.seed} "
        f"--seed {settings.seed} --sglang-enable-deterministic-inference "
        f"--eval-interval {settings.eval_interval} --n-samples-per-eval-prompt 2 --eval-max-response-len 5 "
        "--eval-temperature 1.0 --custom-eval-rollout-log-function-path rl_loop.loop.log_held_out"
    )
    words = [*model.split(), *where.split(), *training.split(), "--fp8-recipe", settings.recipe]
    # On a GPU without apex, which the output layer would need.
    words.append(
        "--fp8-emulate" if settings.device == "cpu" else "--no-gradient-accumulation-fusion"
    )
    if settings.save_interval is not None:
        saved = str(out / "checkpoints")
        words += ["--save", saved, "--load", saved, "--save-interval", str(settings.save_interval)]
    if settings.limit is not None:
        words += ["--max-train-rollout-diff", str(settings.limit)]
    return [*words, *settings.extra]


def log_held_out(rollout_id, args, data, extra_metrics=None) -> bool:
    """Append the held-out rewards to $RL_LOOP_OUT; value of `--custom-eval-rollout-log-function-path`."""
    row = {"rollout": rollout_id, "rewards": data["sums"]["rewards"]}
    with (Path(os.environ["RL_LOOP_OUT"]) / "held_out_rewards.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return False  # slime logs its mean as well


def serve(settings: Settings, out: Path, port: int, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start the rollout server and wait until it answers."""
    command = [sys.executable, "-W", "ignore", "-m", "rl_loop.server", str(out / "served")]
    command += ["--port", str(port), "--fault", settings.fault, "--after", str(settings.after)]
    with (out / "server.log").open("ab") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return server
        except OSError:
            time.sleep(0.2)
    server.kill()
    raise RuntimeError((out / "server.log").read_text()[-2000:])


def environment(settings: Settings, out: Path, slime: Path) -> dict[str, str]:
    """Return the variables of every process of the loop."""
    drop = ("MEGATRON_FP8", "NVTE_", "RAY_", "SLIME_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    path = [str(ROOT), str(HERE.parent)]
    env |= {"SLIME_PATH": str(slime), "RAY_AUTH_MODE": "disabled", "RL_LOOP_OUT": str(out)}
    env |= {"SLIME_HOST_IP": "127.0.0.1", "TENSORBOARD_DIR": str(out / "tensorboard")}
    env |= {"OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0", "WANDB_MODE": "disabled"}
    if settings.device == "cpu":
        path.insert(0, str(HERE / "on_cpu"))
        env["SLIME_ACCELERATOR"] = "cpu"
    # What was added to this process's path, such as a folder of packages, is for the others too.
    path += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))
    return env


def prepare(settings: Settings, out: Path) -> None:
    """Write the problems and the FP8 checkpoint that the server is started with."""
    from rl_loop import arithmetic

    out.mkdir(parents=True, exist_ok=True)
    arithmetic.write(out)
    if (out / "served").exists():
        return
    convert = [sys.executable, "-W", "ignore", "-m", "megatron_fp8_ext.cli", "convert", "hf-to-fp8"]
    convert += [str(settings.sft), str(out / "served"), "--scale-format", settings.served]
    subprocess.run([*convert, "--device", "cpu"], check=True, capture_output=True, cwd=ROOT)


def run(
    settings: Settings,
    out: Path,
    slime: Path,
    timeout: float = 1500,
    enter: Sequence[str] = (),
) -> Outcome:
    """Run the loop to its end; a second run into the same `out` resumes from its last checkpoint.

    `enter` are words before the launcher's command, such as those of `nsenter`.
    """
    from conftest import free_port

    prepare(settings, out)
    env, port = environment(settings, out, slime), free_port()
    server = serve(settings, out, port, env)
    entry = ROOT / "entrypoints" / "train_slime.py"
    command = [*enter, sys.executable, "-W", "ignore", str(entry), "train.py"]
    command += flags(settings, out, port)
    try:
        with (out / "run.log").open("wb") as log:
            done = subprocess.run(
                command, env=env, stdout=log, stderr=log, cwd=out, timeout=timeout
            )
    finally:
        server.kill()
        server.wait()
    return read(out, done.returncode)


def read(out: Path, code: int) -> Outcome:
    """Return what a finished run left in `out`."""
    log = (out / "run.log").read_text(errors="replace")
    rewards = out / "held_out_rewards.jsonl"
    rows = [json.loads(x) for x in rewards.read_text().splitlines()] if rewards.is_file() else []
    found = {int(m[1]): (float(m[2]), float(m[3]), float(m[4])) for m in DIFFERENCE.finditer(log)}
    return Outcome(code, log, {int(r["rollout"]): r["rewards"] for r in rows}, found)


def gain(outcome: Outcome) -> tuple[float, float, float]:
    """Return (mean reward before, after, standard error of the difference), by problem and paired."""
    first, last = min(outcome.held_out), max(outcome.held_out)
    pairs = [_by_problem(outcome.held_out[i]) for i in (first, last)]
    change = [b - a for a, b in zip(*pairs, strict=True)]
    mean = sum(change) / len(change)
    variance = sum((x - mean) ** 2 for x in change) / (len(change) - 1)
    before = sum(pairs[0]) / len(pairs[0])
    return before, before + mean, (variance / len(change)) ** 0.5


def _by_problem(rewards: list[float], samples: int = 2) -> list[float]:
    return [sum(rewards[i : i + samples]) / samples for i in range(0, len(rewards), samples)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--sft", type=Path, required=True)
    parser.add_argument("--slime", type=Path, default=os.environ.get("SLIME_PATH"))
    for name, field in Settings.__dataclass_fields__.items():
        if name in ("sft", "extra"):
            continue
        kind = {
            "seed": int,
            "rollouts": int,
            "after": int,
            "eval_interval": int,
            "save_interval": int,
        }
        kinds = {**kind, "lr": float, "limit": float}
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kinds.get(name, str), default=field.default)
    chosen, extra = parser.parse_known_args()
    named = {k: v for k, v in vars(chosen).items() if k in Settings.__dataclass_fields__}
    if chosen.slime is None or not Path(chosen.slime).is_dir():
        parser.error("--slime: a checkout of slime v0.3 (or SLIME_PATH)")
    shutil.rmtree(chosen.out / "push", ignore_errors=True)
    start = time.monotonic()
    sys.path.insert(0, str(ROOT / "tests"))
    outcome = run(Settings(**named, extra=tuple(extra)), chosen.out.resolve(), Path(chosen.slime))
    print(json.dumps({k: str(v) for k, v in asdict(Settings(**named)).items()}))
    print(f"exit {outcome.code}, {time.monotonic() - start:.0f} s")
    for rollout, (kl, mean, largest) in sorted(outcome.differences.items()):
        print(f"rollout {rollout}: KL {kl:.2e}, difference mean {mean:.2e} max {largest:.2e}")
    if len(outcome.held_out) > 1:
        before, after, error = gain(outcome)
        print(
            f"held-out reward {before:.3f} -> {after:.3f}, standard error of the change {error:.3f}"
        )
    if outcome.code:
        print(outcome.log[-1500:])
    raise SystemExit(outcome.code)


if __name__ == "__main__":
    main()
