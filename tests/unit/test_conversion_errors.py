"""Bad input: one line, exit code 2, nothing left behind; killed processes: nothing or everything."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
pytest.importorskip("safetensors")
import hf_models  # noqa: E402
from conftest import ROOT  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from megatron_fp8_ext import cli  # noqa: E402
from megatron_fp8_ext.checkpoint import compare, fp8, megatron, output, torch_dist  # noqa: E402
from megatron_fp8_ext.errors import UserError  # noqa: E402


@pytest.fixture
def hf(tmp_path):
    return hf_models.make(tmp_path / "hf", hf_models.ALIGNED, shards=2)


@pytest.fixture
def checkpoint(hf, tmp_path):
    megatron.hf_to_megatron(hf, tmp_path / "megatron")
    return tmp_path / "megatron"


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """Run a command; return its error line, having checked that it failed cleanly."""

    def run(*argv: object) -> str:
        before = sorted(p.name for p in tmp_path.iterdir())
        monkeypatch.setattr(sys, "argv", ["megatron-fp8", "convert", *map(str, argv)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        error = capsys.readouterr().err
        assert stopped.value.code == 2, error
        line = error.strip().splitlines()[-1]
        assert line.startswith("megatron-fp8: error: "), error
        assert "Traceback" not in error
        assert sorted(p.name for p in tmp_path.iterdir()) == before, "no output left behind"
        return line

    return run


def test_existing_output(convert, hf, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    for command in ("hf-to-megatron", "hf-to-fp8"):
        assert "out exists" in convert(command, hf, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_missing_parent_and_source(convert, hf, tmp_path):
    assert "create it" in convert("hf-to-fp8", hf, tmp_path / "a" / "b")
    assert "config.json does not exist" in convert("hf-to-fp8", tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    line = convert("megatron-to-hf", tmp_path / "empty", tmp_path / "out", "--hf-reference", hf)
    assert "holds no Megatron checkpoint" in line


def test_missing_shard(convert, hf, tmp_path):
    (hf / "model-00002-of-00002.safetensors").unlink()
    line = convert("hf-to-megatron", hf, tmp_path / "out")
    assert "model-00002-of-00002.safetensors is missing" in line


@pytest.mark.parametrize("keep", [3, 100, -1], ids=["in length", "in header", "in data"])
def test_truncated_safetensors(convert, hf, tmp_path, keep):
    file = hf / "model-00001-of-00002.safetensors"
    os.truncate(file, keep if keep > 0 else file.stat().st_size - 1)
    line = convert("hf-to-fp8", hf, tmp_path / "out")
    assert "model-00001-of-00002.safetensors is" in line
    assert "truncated" in line or "not a safetensors file" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["model.norm.weight"].update(dtype="F4"), "dtype F4"),
        (lambda h: h["model.norm.weight"].update(shape=[255]), "takes 510 bytes"),
        (lambda h: h["model.norm.weight"].pop("shape"), "not a safetensors file"),
        (lambda h: h.update(x=3), "not a safetensors file"),
    ],
    ids=["dtype", "shape", "no shape", "no object"],
)
def test_damaged_header(convert, hf, tmp_path, change, message):
    for file in hf.glob("*.safetensors"):
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        if "model.norm.weight" in header:
            change(header)
            text = json.dumps(header).encode()
            file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    assert message in convert("hf-to-fp8", hf, tmp_path / "out")


def test_name_collisions(convert, hf, tmp_path):
    first, second = sorted(hf.glob("*.safetensors"))
    a, b = load_file(first), load_file(second)
    name = next(iter(a))
    save_file(b | {name: a[name]}, second, metadata={"format": "pt"})
    assert f"{name} is in {first.name} and in {second.name}" in convert(
        "hf-to-fp8", hf, tmp_path / "out"
    )
    raw = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},' * 2
    raw = raw.rstrip(b",").replace(b"},{", b"},", 1) + b"}"
    second.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0")
    assert "'x' is there twice" in convert("hf-to-fp8", hf, tmp_path / "out")


def change_weights(folder: Path, change) -> None:
    for file in folder.glob("*.safetensors"):
        state = load_file(file)
        change(state)
        save_file(state, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    names = {n: f.name for f in folder.glob("*.safetensors") for n in load_file(f)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))


def test_wrong_dtype(convert, hf, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(hf, lambda s: s.update({name: s[name].to(torch.int8)}) if name in s else None)
    for command in ("hf-to-megatron", "hf-to-fp8"):
        assert f"{name} is int8; expected bfloat16" in convert(command, hf, tmp_path / "out")


def test_unknown_missing_and_misshapen_tensors(convert, hf, checkpoint, tmp_path):
    name = "model.layers.1.self_attn.q_proj.weight"
    change_weights(hf, lambda s: s.update(extra=torch.zeros(1)) if name in s else None)
    assert "extra has no place in a qwen2 model" in convert("hf-to-megatron", hf, tmp_path / "out")
    reference = ("--hf-reference", hf)
    line = convert("megatron-to-hf", checkpoint, tmp_path / "out", *reference)
    assert "extra has no counterpart" in line
    change_weights(hf, lambda s: [s.pop(n) for n in ("extra", name) if n in s])
    assert f"has no {name}" in convert("hf-to-megatron", hf, tmp_path / "out")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"intermediate_size": 640}))
    for file in [*hf.glob("*.safetensors*")]:
        file.unlink()
    line = convert("megatron-to-hf", checkpoint, tmp_path / "out", *reference)
    assert "ffn_hidden_size is 512 in the checkpoint, 640 in config.json" in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_theta": 10000.0}, "rotary_base is 1000000 in the checkpoint, 10000"),
        ({"rms_norm_eps": 1e-5}, "norm_epsilon is 1e-06"),
        (
            {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256},
            "num_attention_heads",
        ),
        ({"tie_word_embeddings": False}, "untie_embeddings_and_output_weights is False"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; known: qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "RoPE scaling yarn"),
        ({"rope_theta": 1234.5}, "rope_theta is 1234.5"),
        ({"rope_theta": None}, "no rope_theta"),
        ({"vocab_size": "x"}, "vocab_size is 'x'"),
        ({"vocab_size": 513}, "has 512 rows, the vocabulary of config.json 513"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_reference_that_is_another_model(convert, checkpoint, tmp_path, change, words):
    """What the weights' shapes cannot tell is compared with the checkpoint's own arguments."""
    (tmp_path / "ref").mkdir()
    (tmp_path / "ref/config.json").write_text(json.dumps(hf_models.ALIGNED | change))
    line = convert(
        "megatron-to-hf", checkpoint, tmp_path / "out", "--hf-reference", tmp_path / "ref"
    )
    assert words in line


def test_ties_are_held_to_the_weights(convert, hf, tmp_path):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | hf_models.UNTIED))
    assert "has no lm_head.weight" in convert("hf-to-megatron", hf, tmp_path / "out")
    (hf / "config.json").write_text(json.dumps(config))
    embedding = "model.embed_tokens.weight"
    head = "lm_head.weight"
    change_weights(hf, lambda s: s.update({head: s[embedding].clone()}) if embedding in s else None)
    megatron.hf_to_megatron(hf, tmp_path / "tied twice")  # the same tensor, written twice: fine
    change_weights(hf, lambda s: s.update({head: s[head] + 1}) if head in s else None)
    assert "differs from the embedding" in convert("hf-to-megatron", hf, tmp_path / "out")


def test_already_fp8(convert, hf, tmp_path):
    fp8.hf_to_fp8(hf, tmp_path / "fp8")
    assert "quantized already" in convert("hf-to-fp8", tmp_path / "fp8", tmp_path / "out")
    assert "fp8-to-hf" in convert("hf-to-megatron", tmp_path / "fp8", tmp_path / "out")
    assert "is not quantized" in convert("fp8-to-hf", hf, tmp_path / "out")
    assert "choose e8m0 or fp32" in convert(
        "hf-to-fp8", hf, tmp_path / "out", "--scale-format", "bf16"
    )
    change_weights(
        tmp_path / "fp8",
        lambda s: [s.update({n: s[n].half()}) for n in list(s) if n.endswith("scale_inv")],
    )
    line = convert("fp8-to-hf", tmp_path / "fp8", tmp_path / "out")
    assert "weight_scale_inv is torch.float16" in line


# --- Damaged and malicious Megatron checkpoints


def read_back(convert, checkpoint, hf, tmp_path) -> str:
    return convert("megatron-to-hf", checkpoint, tmp_path / "out", "--hf-reference", hf)


@pytest.mark.parametrize("keep", [0, 50, -1])
def test_corrupt_index(convert, checkpoint, hf, tmp_path, keep):
    index = checkpoint / "release/.metadata"
    os.truncate(index, keep if keep >= 0 else index.stat().st_size - 1)
    assert "release/.metadata cannot be read" in read_back(convert, checkpoint, hf, tmp_path)


def test_missing_and_truncated_pieces(convert, checkpoint, hf, tmp_path):
    file = checkpoint / "release/__0_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "it is truncated" in read_back(convert, checkpoint, hf, tmp_path)
    file.write_bytes(b"\0" * len(whole))
    assert "cannot be read" in read_back(convert, checkpoint, hf, tmp_path)
    file.unlink()
    assert "the file is missing" in read_back(convert, checkpoint, hf, tmp_path)


def edit_index(checkpoint: Path, edit) -> None:
    index = checkpoint / "release/.metadata"
    metadata = pickle.loads(index.read_bytes())  # of our own making
    edit(metadata)
    index.write_bytes(pickle.dumps(metadata))


def test_incomplete_index(convert, checkpoint, hf, tmp_path):
    name = "decoder.layers.mlp.linear_fc2.weight"
    edit_index(checkpoint, lambda m: m.state_dict_metadata[name].chunks.pop())
    assert "the checkpoint is incomplete" in read_back(convert, checkpoint, hf, tmp_path)
    edit_index(checkpoint, lambda m: m.state_dict_metadata.pop(name))
    assert f"has no {name}" in read_back(convert, checkpoint, hf, tmp_path)


def test_a_piece_outside_of_the_folder(convert, checkpoint, hf, tmp_path):
    def escape(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = "../../" + info.relative_path

    edit_index(checkpoint, escape)
    assert "outside of the checkpoint folder" in read_back(convert, checkpoint, hf, tmp_path)


class Runs:
    """Unpickled without care, this calls a function."""

    def __init__(self, function, *args) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def attacks(pwned: Path) -> dict[str, object]:
    code = f"open({str(pwned)!r}, 'w')"
    return {
        "os.system": Runs(os.system, f"touch {pwned}"),
        "builtins.eval": Runs(eval, code),
        "builtins.exec": Runs(exec, code),
        "subprocess": Runs(subprocess.call, ["touch", str(pwned)]),
        "getattr": Runs(getattr, dict, "fromkeys"),
        "torch.load": Runs(torch.load, str(pwned), None),
    }


@pytest.mark.parametrize("name", attacks(Path("x")))
@pytest.mark.parametrize("where", ["index", "inside the index", "common state", "tensor"])
def test_nothing_in_a_checkpoint_is_executed(convert, checkpoint, hf, tmp_path, where, name):
    pwned = tmp_path / "pwned"
    evil = attacks(pwned)[name]
    release = checkpoint / "release"
    if where == "index":
        (release / ".metadata").write_bytes(pickle.dumps(evil))
    elif where == "inside the index":
        edit_index(checkpoint, lambda m: m.storage_data.update(evil=evil))
    elif where == "common state":
        with zipfile.ZipFile(release / "common.pt", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"args": evil}, protocol=2))
    else:
        blob = release / "evil.distcp"
        torch.save(evil, blob)

        def point(metadata):
            for key, info in metadata.storage_data.items():
                if key.fqn == "decoder.final_layernorm.weight":
                    info.relative_path, info.offset = blob.name, 0
                    info.length = blob.stat().st_size

        edit_index(checkpoint, point)
    line = read_back(convert, checkpoint, hf, tmp_path)
    assert not pwned.exists(), "code from the checkpoint ran"
    if where != "tensor":
        assert "has no place in" in line
    # The control: an unrestricted unpickler does run this very object.
    if name == "builtins.eval":
        pickle.loads(pickle.dumps(evil)).close()
        assert pwned.exists()


# --- Full disks and killed processes


def test_too_little_space_is_seen_before_writing(convert, hf, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage)
    assert "GB and" in convert("hf-to-fp8", hf, tmp_path / "out")


@pytest.mark.parametrize("command", ["hf-to-megatron", "hf-to-fp8"])
def test_disk_full_on_the_way(convert, hf, tmp_path, command):
    """The kernel refuses a write in the middle (a limit on file size; the same path as ENOSPC)."""
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        line = convert(command, hf, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert "no space left while writing" in line or "cannot be written" in line


def _convert_step_by_step(action, steps, go) -> None:
    """In a child: do a conversion, and wait for permission at every progress, sync and rename."""

    def wait(what):
        steps.send(what)
        go.recv()

    fsync, rename = os.fsync, os.rename
    os.fsync = lambda fd: (wait("sync"), fsync(fd))[1]

    def slow_rename(a, b):
        wait("before rename")
        rename(a, b)
        wait("after rename")

    os.rename = slow_rename
    action(lambda total: lambda nbytes: wait("progress"))
    steps.send("end")


def killed_at(stop: str, count: int, action) -> int:
    """Run `action` in a process and kill -9 it at the `count`-th step named `stop`; return its exit."""
    context = multiprocessing.get_context("fork")
    (ours, steps), (go, theirs) = context.Pipe(False), context.Pipe(False)
    child = context.Process(target=_convert_step_by_step, args=(action, steps, go))
    child.start()
    seen = 0
    while (what := ours.recv()) != "end":
        seen += what == stop
        if seen == count:
            os.kill(child.pid, signal.SIGKILL)
            break
        theirs.send(None)
    child.join()
    return child.exitcode


@pytest.mark.parametrize(
    ("stop", "count"),
    [("progress", 1), ("progress", 9), ("sync", 1), ("sync", 3), ("before rename", 1), ("after rename", 1)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["fp8", "megatron", "hf"])
def test_kill_9_leaves_nothing_or_all(hf, checkpoint, tmp_path, kind, stop, count):
    out = tmp_path / "out"
    action = {
        "fp8": lambda p: fp8.hf_to_fp8(hf, out, progress=p, shard_bytes=600_000),
        "megatron": lambda p: megatron.hf_to_megatron(hf, out, progress=p),
        "hf": lambda p: megatron.megatron_to_hf(checkpoint, out, hf, progress=p),
    }[kind]
    assert killed_at(stop, count, action) == -signal.SIGKILL
    if stop == "after rename":
        assert check_complete(kind, hf, out)
        return
    assert not out.exists()
    left = [p.name for p in tmp_path.iterdir() if p.name not in ("hf", "megatron")]
    assert len(left) == 1 and left[0].startswith(".out.partial-")
    action(None)  # the next run cleans up and succeeds
    assert check_complete(kind, hf, out)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]


def check_complete(kind: str, hf: Path, out: Path) -> bool:
    if kind == "fp8":
        return compare.compare(hf, out).passes(min_sqnr=25)
    return compare.compare(hf, out).passes(bitwise=True)


def test_another_running_conversion_is_left_alone(hf, tmp_path):
    theirs = tmp_path / f".out.partial-{output.socket.gethostname()}-{os.getpid()}"
    theirs.mkdir()
    output._remove_abandoned(tmp_path / "out")
    assert theirs.exists(), "its process lives"


# --- Memory


MEASURE = """
import resource, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from megatron_fp8_ext.checkpoint import fp8, megatron, mapping, huggingface, torch_dist
from torch.distributed.checkpoint import filesystem, metadata
folder = Path({folder!r})
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
{warm_up}
before = peak()
{action}
print("GREW", peak() - before)
"""
ACTIONS = {
    "hf to fp8": "fp8.hf_to_fp8(folder / 'hf', folder / 'fp8', shard_bytes={shard})",
    "hf to megatron": "megatron.hf_to_megatron(folder / 'hf', folder / 'mg')",
    "megatron to hf": "megatron.megatron_to_hf(folder / 'mg', folder / 'back', folder / 'hf', "
    "shard_bytes={shard})",
    "fp8 to hf": "fp8.fp8_to_hf(folder / 'fp8', folder / 'bf16', shard_bytes={shard})",
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's peak memory")
def test_memory_is_below_two_shards(tmp_path):
    """7B's proportions at about 1/75 of its size; the full size is measured in docs/conversion.md."""
    shard = 50_000_000
    config = hf_models.ALIGNED | {
        "hidden_size": 1024, "intermediate_size": 5376, "num_hidden_layers": 4,
        "num_attention_heads": 8, "vocab_size": 16384,
    }  # fmt: skip
    total = sparse_model(tmp_path / "hf", config)
    assert total > 3 * shard
    (tmp_path / "small").mkdir()
    sparse_model(tmp_path / "small" / "hf", hf_models.ALIGNED)
    for action in ACTIONS.values():
        # Once with a small model, so that what torch itself allocates at first use does not count.
        code = MEASURE.format(
            root=str(ROOT),
            folder=str(tmp_path),
            action=action.format(shard=shard),
            warm_up=action.format(shard=shard).replace("folder", "(folder / 'small')"),
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        grew = int(done.stdout.split()[-1])
        print(
            f"{action}: {grew / 1e6:.0f} MB, shard {shard / 1e6:.0f} MB, model {total / 1e6:.0f} MB"
        )
        assert grew < 2 * shard, action


def sparse_model(path: Path, config: dict) -> int:
    """A folder of zeros that takes no disk."""
    from megatron_fp8_ext.checkpoint.safetensors import FileWriter

    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    specs = {name: (torch.bfloat16, shape) for name, shape in hf_models.shapes(config).items()}
    writer = FileWriter(path / "model.safetensors", specs)
    writer._missing.clear()
    writer.close()
    return (path / "model.safetensors").stat().st_size


def test_opening_says_which_step_is_missing(checkpoint):
    with pytest.raises(UserError, match="iter_0000005 is not there"):
        torch_dist.open_checkpoint(checkpoint, "5")
