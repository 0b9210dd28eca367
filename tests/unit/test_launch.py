"""Presets, precedence, checks and rendering: everything of `megatron-fp8 run` short of starting it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, free_port
from dev_tools import tool

from megatron_fp8_ext import presets
from megatron_fp8_ext.checkpoint.architecture import from_config
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.launch import (
    architecture,
    checks,
    plan,
    reference,
    render,
    request,
    secrets,
    start,
)
from megatron_fp8_ext.launch import reference_tools as tools

SNAPSHOTS = Path(__file__).parent / "dry_runs"
QWEN_15B = presets.model_facts("Qwen2.5-1.5B")


def asked(name: str, *assignments: str, **fields) -> request.Request:
    return request.with_set(request.Request(preset=presets.get(name), **fields), assignments)


def planned(name: str, *assignments: str, facts: plan.Facts | None = None, **fields) -> plan.Plan:
    return plan.build(asked(name, *assignments, **fields), facts or plan.Facts())


def test_several_nodes_begin_with_a_preflight():
    one = render.launch(planned("qwen2.5-7b-cpt")).steps
    two = render.launch(planned("qwen2.5-7b-cpt", "nodes=2")).steps
    assert [step.argv[0] for step in one] == ["torchrun"]
    assert [step.argv[0] for step in two] == ["megatron-fp8", "torchrun"]


def dry_run(name: str, launcher: str | None = None) -> str:
    inputs = {"data": "DATA", "model": "MODEL", "init": "STABLE/iter_0035000", "eval-data": "EVAL"}
    return render.shell(
        render.launch(planned(name, inputs=inputs, launcher=launcher, slime="SLIME"))
    )


@pytest.mark.parametrize("name", presets.names())
def test_dry_runs_are_as_recorded(name):
    """UPDATE_SNAPSHOTS=1 records them anew; read the difference before you commit it."""
    text = dry_run(name) + "\n"
    if not name.endswith("-bf16"):
        text += dry_run(name, "slurm") + "\n"
    file = SNAPSHOTS / f"{name}.sh"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert file.read_text() == text
    shell = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert shell.returncode == 0, shell.stderr


@pytest.mark.parametrize("name", presets.names())
def test_sbatch_files_are_valid_shell(name):
    launched = render.launch(planned(name, launcher="slurm", slime="SLIME"))
    (content,) = launched.files.values()
    done = subprocess.run([tool("shellcheck"), "-"], input=content, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert "0.0.0.0" not in content and "doctor" in content and "#SBATCH --requeue" in content


def test_every_setting_has_an_origin_and_every_correction_its_reason():
    for name in presets.names():
        for rows in presets.get(name).sections.values():
            for key, setting in rows.items():
                assert setting.origin in presets.ORIGINS and setting.origin != "user", (name, key)
                assert setting.origin != "correction" or setting.note, (name, key)


def test_a_twin_differs_in_precision_alone():
    for name in presets.names():
        if name.endswith("-bf16"):
            continue
        fp8, bf16 = planned(name).settings, planned(name + "-bf16").settings
        differing = {k for k in fp8 if fp8[k].value != bf16[k].value}
        assert differing <= {"fp8-recipe", "save", "load", "data-cache-path", "tensorboard-dir"}
        assert "e4m3" not in planned(name + "-bf16").flags


def test_precedence(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 2e-4\nmin-lr: 2e-5\nnodes: 2\nenvironment: {NCCL_SOCKET_IFNAME: eth0}\n")
    base = request.with_config(asked("qwen2.5-7b-cpt"), file)
    base = request.with_set(base, ["min-lr=3e-5", "clip-grad=0.5"])
    full = plan.build(
        request.Request(
            preset=base.preset, overrides=base.overrides, environment=base.environment,
            extra=("--clip-grad", "0.25", "--new-flag", "-1"),
        ),
        plan.Facts(),
    )  # fmt: skip
    assert (full.value("--lr"), full.value("--min-lr")) == ("2e-4", "3e-5")
    assert full.argv.count("--clip-grad") == 1 and full.value("--clip-grad") == "0.25"
    assert full.nodes == 2 and full.environment["NCCL_SOCKET_IFNAME"] == "eth0"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("seq-lenght: 5", "did you mean 'seq-length'"),
        ("lr: 1\nlr: 2", "line 2: 'lr' stands twice"),
        ("lr: [", "line 1"),
        ("- lr", "not a mapping"),
        ("environment: {WANDB_API_KEY: abc}", "secrets do not belong"),
        ("lr: {value: 1, nte: x}", "did you mean 'note'"),
    ],
)
def test_bad_yaml_names_file_and_mend(tmp_path, content, words):
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        request.with_config(asked("qwen2.5-7b-cpt"), file)
    assert "mine.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_users_preset_extends_ours(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text("extends: qwen2.5-1.5b-cpt\nexperiment: small\nsettings: {lr: 3e-4}\n")
    found = plan.build(request.Request(preset=presets.get(str(file))), plan.Facts())
    assert found.value("--lr") == "3e-4" and found.output == "exp/small"
    file.write_text("extends: small\n")
    with pytest.raises(UserError, match="extends"):
        presets.get(str(file))


def test_architecture_comes_from_config_json():
    found = architecture.flags(QWEN_15B, 2)
    assert found["rotary-base"] == "1000000"  # slime's shell file says 10000
    assert found["padded-vocab-size"] == "151936" and found["add-qkv-bias"] == "true"
    assert found["untie-embeddings-and-output-weights"] == "false"
    nested = {k: v for k, v in QWEN_15B.items() if k != "rope_theta"}
    assert (
        architecture.flags({**nested, "rope_parameters": {"rope_theta": 5e5}}, 1)["rotary-base"]
        == "500000"
    )
    assert (
        architecture.flags({**QWEN_15B, "vocab_size": 151937}, 8)["padded-vocab-size"] == "152576"
    )
    assert architecture.flags({**QWEN_15B, "head_dim": 64}, 1)["kv-channels"] == "64"
    for broken in ({"model_type": "bert"}, {"hidden_size": "x"}, {"num_hidden_layers": 0}):
        with pytest.raises(UserError, match=re.escape("config.json")):
            architecture.flags({**QWEN_15B, **broken}, 1)


def test_run_and_convert_tell_megatron_the_same():
    for model in (QWEN_15B, {**QWEN_15B, "model_type": "qwen3", "head_dim": 64}):
        printed = from_config(model, "config.json").megatron_flags(2)
        for name, value in architecture.flags(model, 2).items():
            line = f"--{name}" if value == "true" else f"--{name} {value}"
            assert (line in printed) is (value != "false"), line


def test_other_families():
    qwen3 = architecture.flags({**QWEN_15B, "model_type": "qwen3"}, 1)
    assert (qwen3["qk-layernorm"], qwen3["add-qkv-bias"]) == ("true", "false")
    mistral = {**QWEN_15B, "model_type": "mistral"}
    assert architecture.flags({**mistral, "sliding_window": None}, 1)["add-qkv-bias"] == "false"
    for window in (
        {},
        {"sliding_window": 4096},
    ):  # 4096 is what transformers takes without the field
        with pytest.raises(
            UserError, match="sliding_window is 4096; Megatron's flags know no window"
        ):
            architecture.flags({**mistral, **window}, 1)


def test_tensor_parallel_after_dashes_reaches_the_vocabulary():
    found = planned("qwen2.5-1.5b-cpt", extra=("--tensor-model-parallel-size", "8"))
    assert found.value("--padded-vocab-size") == "151936"
    assert any("--num-query-groups 2 is not divisible by TP 8" in p for p in checks.problems(found))


def test_decay_is_translated_and_resumes_from_itself():
    inputs = {"init": "exp/x/checkpoints/iter_0035000"}
    first = planned("qwen2.5-7b-cpt-decay", inputs=inputs)
    assert first.argv[-4:] == ("--load", "exp/x/checkpoints", "--ckpt-step", "35000")
    assert first.value("--train-iters") == "40000" and "--no-load-optim" not in first.argv
    early = planned(
        "qwen2.5-7b-cpt-decay", "lr-wsd-decay-iters=2000", inputs={"init": "s/iter_0010000"}
    )
    assert early.value("--train-iters") == "12000"
    again = planned("qwen2.5-7b-cpt-decay", inputs=inputs, facts=plan.Facts(saved_iteration=36000))
    assert again.argv[-2:] == ("--load", first.save) and "--ckpt-step" not in again.argv
    latest = planned(
        "qwen2.5-7b-cpt-decay", inputs={"init": "s"}, facts=plan.Facts(init_iteration=7000)
    )
    assert latest.value("--ckpt-step") == "7000"


def test_the_scale_format_of_slime_runs_is_pinned():
    for name, scales in (("qwen2.5-7b-sft-stage1", "0"), ("qwen2.5-7b-rl-stage1", "1")):
        found = planned(name)
        assert found.environment["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] == scales
        submitted = render.launch(found).steps[-1].argv
        assert "megatron_fp8_ext.slime_plugin" in submitted, "our launcher checks and expands"
        assert found.value("--fp8-recipe") == ("infir2-rl" if scales == "1" else "infir2")


def test_all_problems_at_once(tmp_path):
    (tmp_path / "file").touch()
    found = checks.problems(
        planned(
            "qwen2.5-7b-cpt", "tensor-model-parallel-size=3", "seq-length=1001", "nodes=2",
            "max-position-embeddings=500", "pipeline-model-parallel-size=5",
            inputs={
                "data": "0.5 none1 0.5 none2", "model": "no-model", "init": "no-init",
                "output": str(tmp_path / "file" / "out"),
            },
        )
    )  # fmt: skip
    text = "\n".join(found)
    for words in (
        "16 ranks is no multiple of TP 3 x PP 5", "--num-attention-heads 28 is not divisible by TP 3",
        "--num-layers 28 is not divisible by PP 5", "--max-position-embeddings 500 is below",
        "none1.idx does not exist", "--model no-model", "--init no-init", "cannot be written",
        "--rdzv-endpoint", "not a multiple of 16",
    ):  # fmt: skip
        assert words in text, text
    assert all("\n" not in line and (": " in line or ";" in line) for line in found)


def test_numbers_that_are_none_are_all_named():
    found = planned(
        "qwen2.5-7b-cpt", "seq-length=long", "micro-batch-size=0", extra=("--num-layers", "x")
    )
    text = "\n".join(checks.problems(found))
    for words in (
        "--seq-length long: write a whole",
        "--micro-batch-size 0: must be",
        "--num-layers x: ",
    ):
        assert words in text, text
    assert "--data" in text


def test_nothing_to_mend_where_nothing_is_wrong(tmp_path):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"text{suffix}").write_text("x")
    (tmp_path / "init" / "iter_0000005").mkdir(parents=True)
    inputs = {
        "data": str(tmp_path / "text"),
        "model": "m",
        "init": str(tmp_path / "init"),
        "output": str(tmp_path),
    }
    facts = plan.Facts(config=presets.model_facts("Qwen2.5-7B"), init_iteration=5)
    assert checks.problems(planned("qwen2.5-7b-cpt", inputs=inputs, facts=facts)) == []
    random = planned(
        "qwen2.5-7b-cpt", inputs={k: inputs[k] for k in ("data", "model", "output")}, facts=facts
    )
    assert ["random weights" in p for p in checks.problems(random)] == [True]


def test_rl_holds_the_export_to_the_recipe():
    config = {**presets.model_facts("Qwen2.5-7B"), "quantization_config": {"scale_fmt": "ue8m0"}}
    text = "\n".join(
        checks.problems(planned("qwen2.5-7b-rl-stage1", facts=plan.Facts(config=config)))
    )
    assert "has no fmt" in text and "--scale-format fp32" in text
    fits = planned("qwen2.5-7b-rl-stage1", "fp8-recipe=infir2", facts=plan.Facts(config=config))
    assert "every weight push" not in "\n".join(checks.problems(fits))
    bf16 = plan.Facts(config=presets.model_facts("Qwen2.5-7B"))
    for name, facts, words in (
        ("qwen2.5-7b-rl-stage1", bf16, "served in BF16 and infir2-rl trains in FP8"),
        (
            "qwen2.5-7b-rl-stage1-bf16",
            plan.Facts(config=config),
            "served in FP8 and bf16 trains in BF16",
        ),
    ):
        assert words in "\n".join(checks.problems(planned(name, facts=facts)))
        mixed = planned(name, facts=facts, extra=("--allow-mixed-rollout",))
        assert words not in "\n".join(checks.problems(mixed))
    assert not checks._quantization(planned("qwen2.5-7b-rl-stage1-bf16", facts=bf16))
    engine = planned("qwen2.5-7b-rl-stage1", "rollout-num-gpus-per-engine=8")
    assert any("key/value rows 512" in p for p in checks.problems(engine))


def test_packed_samples_are_held_to_the_length(tmp_path):
    for package in ("numpy", "tokenizers", "jinja2"):
        pytest.importorskip(package)
    from chat import write_tokenizer

    from megatron_fp8_ext.sft import pack_job, shards, template

    def problems(*assignments):
        sizes = ("trainer=megatron", "tensor-model-parallel-size=2", *assignments)
        found = planned(
            "qwen2.5-1.5b-sft-stage1", *sizes, inputs={"data": str(tmp_path / "packed")}
        )
        return "\n".join(checks.problems(found))

    (tmp_path / "packed").mkdir()
    assert "is no folder of packed samples" in problems()
    (tmp_path / "packed").rmdir()
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "samples.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    chat = template.load(write_tokenizer(tmp_path / "tokenizer"))
    options = pack_job.Options(seq_length=256)
    pack_job.pack([tmp_path / "samples.jsonl"], chat, tmp_path / "packed", options)
    longest = shards.SampleShards(tmp_path / "packed").longest
    assert "longest sample" not in problems() and "packs are multiples" not in problems()
    short = problems("seq-length=16")
    assert f"longest sample has {longest} tokens, --seq-length is 16" in short
    assert "packs are multiples of 256 tokens" in short
    (tmp_path / "packed" / "index.json").write_text("{")
    assert "index.json" in problems()


def test_sft_with_megatron_alone_needs_the_loss():
    found = planned("qwen2.5-7b-sft-stage1", "trainer=megatron", inputs={"data": "packed"})
    assert found.value("--sft-data") == "packed" and "--prompt-data" not in found.argv
    with pytest.raises(UserError, match="trains with slime"):
        planned("qwen2.5-7b-rl-stage1", "trainer=megatron")


SECRET = "hunter2-of-a-user"
TOKENS = (
    "--wandb-key", SECRET, f"--sglang-api-key={SECRET}", "--hf_token", SECRET,
    "--train-env-vars", f'{{"WANDB_API_KEY": "{SECRET}", "NAME": "kept"}}',
    "--exec", f"HF_TOKEN={SECRET} true",
    "--proxy", f"http://me:{SECRET}@host:1", "--other", "hf_abcdefghijklmnop",
)  # fmt: skip


@pytest.mark.parametrize("launcher", ["ray", "slurm"])
def test_secrets_are_not_shown(launcher):
    found = planned("qwen2.5-7b-rl-stage1", extra=TOKENS, slime="S", launcher=launcher)
    text = render.shell(render.launch(found)) + start.record(found)
    assert SECRET not in text and "hf_abcdef" not in text
    assert "kept" in text and "http://me:" in text and "--input-key prompt" in text
    wrong = [p for p in checks.problems(found) if "export it as a variable" in p]
    assert len(wrong) == 7 and SECRET not in str(wrong)


def test_a_secret_of_the_environment_is_known_wherever_it_stands():
    facts = plan.Facts(
        secrets=secrets.values({"MY_TOKEN": SECRET, "PIN_KEY": "1", "HOME": "/home"})
    )
    found = planned("qwen2.5-7b-cpt", extra=("--run-name", f"a-{SECRET}-b"), facts=facts)
    text = render.shell(render.launch(found), facts.secrets) + start.record(found)
    assert SECRET not in text and "--run-name 'a-***-b'" in text


def test_a_preset_with_a_secret_does_not_start(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"extends: qwen2.5-1.5b-cpt\nexperiment: x\nenvironment: {{WANDB_API_KEY: {SECRET}}}\n"
    )
    found = plan.build(
        request.Request(preset=presets.get(str(file)), launcher="slurm"), plan.Facts()
    )
    assert SECRET not in render.shell(render.launch(found))
    assert any("WANDB_API_KEY: secrets do not belong" in p for p in checks.problems(found))


def test_nothing_binds_beyond_loopback():
    alone = planned("qwen2.5-7b-sft-stage1", "nodes=1", slime="S")
    first, ray, submit = render.launch(alone).steps
    assert first.argv[:4] == ("env", "SLIME_PATH=S", "megatron-fp8", "doctor")
    assert " ".join(first.argv[4:]) == "--gpus 8 --slime --engine-gpus 0"
    assert ray.argv[:2] == ("ray", "start") and "0.0.0.0" not in str((first, ray, submit))
    assert ray.argv[ray.argv.index("--dashboard-host") + 1] == "127.0.0.1"
    environment = json.loads(submit.argv[submit.argv.index("--runtime-env-json") + 1])
    assert environment["env_vars"]["PYTHONPATH"] == "S:${PYTHONPATH}"
    assert environment["env_vars"]["SLIME_PATH"] == "S"


def test_a_running_ray_cluster_is_examined_by_a_job_of_its_own_first():
    name, address = "qwen2.5-7b-rl-stage1", "http://head:8265"
    found = planned(name, slime="S", ray_address=address, inputs={"model": "M"})
    check, submit = render.launch(found).steps
    for step in (check, submit):
        assert step.argv[:5] == ("ray", "job", "submit", "--address", address)
    words = " ".join(check.argv[check.argv.index("--") + 1 :])
    assert words.startswith(
        "python3 -m megatron_fp8_ext.cli doctor --every-node --cluster-gpus 32 --gpus 8"
    )
    assert words.endswith("--slime --engine-gpus 4 --hf-checkpoint M --tensor-parallel 4")
    assert "NVTE_" not in str(check.argv), "doctor takes a recipe's variables for strays"
    text = render.shell(render.launch(found))
    assert "--tensor-parallel 4 &&\nray job submit" in text, "pasted, it stops there as well"


def test_options_of_another_launcher_are_not_dropped_in_silence():
    ray = planned("qwen2.5-7b-rl-stage1", ray_address="http://h:1", rdzv_endpoint="h:2")
    assert ray.notes[-1] == "--rdzv-endpoint is for --launcher torchrun, and left out here"
    megatron = planned("qwen2.5-7b-cpt", ray_address="http://h:1")
    assert megatron.notes[-1] == "--ray-address is for --launcher ray, and left out here"


def test_a_ray_cluster_that_does_not_answer_is_named(tmp_path):
    address = f"http://127.0.0.1:{free_port()}"
    inputs = {"output": str(tmp_path / "out")}
    found = planned("qwen2.5-7b-rl-stage1", slime="S", ray_address=address, inputs=inputs)
    with pytest.raises(UserError, match=f"--ray-address {address}: no Ray dashboard answers"):
        start.start(found, render.launch(found))
    assert not (tmp_path / "out").exists(), "nothing was written"


def test_a_failed_preflight_starts_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = (sys.executable, "-c", "open('started', 'w'); raise SystemExit(3)")
    check = render.Step((sys.executable, "-c", "raise SystemExit(1)"), why="preflight: mend")
    found = planned("qwen2.5-7b-cpt", inputs={"output": str(tmp_path / "out")})
    assert start.start(found, render.Launch((check, render.Step(program)))) == 1
    assert "preflight failed; training was not started" in capfd.readouterr().err
    assert not Path("started").exists()


# The reference's scripts and tools.


def script(path: str, *argv: str, **env: str):
    shim = f'megatron-fp8() {{ "{sys.executable}" -m megatron_fp8_ext.cli "$@"; }}; exec() {{ "$@"; }}; '
    text = (ROOT / path).read_text()
    return subprocess.run(
        ["bash", "-c", shim + text, path, *argv], capture_output=True, text=True, cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **env},
    )  # fmt: skip


@pytest.mark.parametrize("name", [n for n in presets.names() if not n.endswith("-bf16")])
def test_each_script_is_one_line_over_its_preset(name):
    preset = presets.get(name)
    lines = (ROOT / preset.script).read_text().splitlines()
    assert lines[1:] == [f'exec megatron-fp8 run {name} --as-script "$@"']
    assert os.access(ROOT / preset.script, os.X_OK)


def test_positional_habits():
    done = script(
        "scripts/CPT/InfiR2_CPT_FP8_7B_decay.sh", "--load", "exp/InfiR2_CPT_FP8_7B/checkpoints/iter_0035000",
        "--nnodes", "2", "--rdzv_endpoint", "h0:29400", "--lr", "9e-5", "--dry-run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("--load exp/InfiR2_CPT_FP8_7B/checkpoints \\", "--ckpt-step 35000", "--nnodes 2",
                  "--rdzv-endpoint h0:29400", "--lr 9e-5"):  # fmt: skip
        assert words in done.stdout, done.stdout
    done = script(
        "scripts/SFT/InfiR2_SFT_FP8_7B_stage1.sh", "--actor-num-nodes", "1", "--dry-run",
        DATA_DIR="/d/sft", HF_CHECKPOINT="/m", REF_LOAD="/r", SAVE_DIR="/s",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in (
        "--actor-num-nodes 1",
        "--prompt-data /d/sft",
        "--ref-load /r",
        "--save /s",
        "--load /s",
    ):
        assert words in done.stdout, done.stdout


def test_a_script_without_inputs_starts_nothing():
    done = script("scripts/CPT/InfiR2_CPT_FP8_7B.sh")
    assert done.returncode == 2 and "3 problems" in done.stderr, done.stderr


def test_load_of_the_runs_own_folder_is_a_resume():
    own = "exp/InfiR2_CPT_FP8_7B/checkpoints"
    found = reference.translate(asked("qwen2.5-7b-cpt"), ["--load", own], {})
    assert "init" not in found.request.inputs and not found.notes
    with pytest.raises(UserError, match="--load needs a value"):
        reference.translate(asked("qwen2.5-7b-cpt"), ["--load"], {})


def test_the_tools_keep_their_argument_names():
    words = tools.bf16_to_fp8(
        ["--input-bf16-hf-path", "a", "--output-fp8-hf-path", "b", "--force-pow-2-scale", "False"]
    )
    assert words == ["convert", "hf-to-fp8", "a", "b", "--scale-format", "fp32"]
    words = tools.torch_dist_to_hf(
        ["--input-dir", "c/iter_0000005", "--output-dir", "d", "--origin-hf-dir", "e"]
    )
    assert words == [
        "convert",
        "megatron-to-hf",
        "c",
        "d",
        "--hf-reference",
        "e",
        "--ckpt-step",
        "5",
    ]
    with pytest.raises(UserError, match="--origin-hf-dir is missing"):
        tools.torch_dist_to_hf(["--input-dir", "c", "--output-dir", "d"])


@pytest.mark.parametrize(
    "path", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "scripts").glob("*/*.sh"))
)
def test_each_of_the_fourteen_scripts_takes_a_dry_run(path):
    done = script(path, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert any(
        word in done.stdout for word in ("torchrun", "ray job submit", "sglang.launch_server")
    )
    assert "# problem: " in done.stdout  # no input was given
    assert len(list((ROOT / "scripts").glob("*/*.sh"))) == 14


# The command blocks of the reference's README that start something of ours, as they stand there (less a
# stray fence after iter_0035000), and what each becomes. Variables are edited inside its scripts; here they
# are exported. Its other blocks clone, build an image, start Ray and install evalscope.
README = {
    "torchrun": [
        "bash scripts/CPT/InfiR2_CPT_FP8_7B.sh",
        """# 首先\uff0c确定您在稳定阶段的检查点
# 然后使用该检查点运行退火脚本
bash scripts/CPT/InfiR2_CPT_FP8_7B_decay.sh \\
    --load exp/InfiR2_CPT_FP8_7B/checkpoints/iter_0035000""",
    ],
    "ray job submit": [
        "bash scripts/SFT/InfiR2_SFT_FP8_7B_stage1.sh",
        """export DATA_DIR=/path/to/stage1_data
export HF_CHECKPOINT=/path/to/base_models_hf/qwen2.5-7B-Instruct/
export REF_LOAD=/path/to/base_models_/qwen2.5-7B_torch_dist/
bash scripts/SFT/InfiR2_SFT_FP8_7B_stage1.sh""",
        """export DATA_DIR=/path/to/data/dapo-math-17k.jsonl
export HF_CHECKPOINT=/path/to/your_model/
export REF_LOAD=/path/to/your_model/
bash scripts/RL/InfiR2_RL_FP8_7B_stage1_4node.sh""",
    ],
    "megatron-fp8 convert megatron-to-hf": [
        """# 步骤 1: 将 PyTorch 分布式检查点转换为 HuggingFace 格式
PYTHONPATH=training/Megatron-LM:training/slime python tools/convert_torch_dist_to_hf.py \\
    --input-dir /path/to/InfiR2_SFT_FP8_stg2 \\
    --output-dir /path/to/InfiR2_SFT_FP8_stg2_hf \\
    --origin-hf-dir /path/to/models/Qwen2.5-7B-Instruct""",
    ],
    "megatron-fp8 convert hf-to-fp8": [
        """# 步骤 2: 将 BF16 格式的 HuggingFace 模型转换为 FP8 E8M0 格式
python tools/bf16_cast_fp8.py \\
    --input-bf16-hf-path /path/to/InfiR2_SFT_FP8_stg2_hf \\
    --output-fp8-hf-path /path/to/InfiR2_SFT_FP8_stg2_hf_e8m0 \\
    --force-pow-2-scale True""",
    ],
}


@pytest.mark.parametrize(
    ("becomes", "block"), [(name, block) for name, blocks in README.items() for block in blocks]
)
def test_readme_blocks_resolve(becomes, block, tmp_path):
    for name, code in (
        ("megatron-fp8", f'exec "{sys.executable}" -m megatron_fp8_ext.cli "$@"'),
        ("python", f'PYTHONPATH="{ROOT}" exec "{sys.executable}" "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", f"{block} --dry-run"], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert done.returncode == 0, done.stderr
    assert becomes in done.stdout
    if "decay" in block:
        assert "--load exp/InfiR2_CPT_FP8_7B/checkpoints " in done.stdout
        assert "--ckpt-step 35000" in done.stdout
    for path in re.findall(r"/path/to/\S+", block):
        assert path.rstrip("/") in done.stdout
