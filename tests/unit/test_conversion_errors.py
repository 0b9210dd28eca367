"""Bad input: one line, exit code 2, nothing executed, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
pytest.importorskip("safetensors")
import hf_models  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from megatron_fp8_ext import cli  # noqa: E402
from megatron_fp8_ext.checkpoint import fp8, megatron, output, torch_dist  # noqa: E402
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


def test_objects_of_the_script_that_saved_are_inert(convert, checkpoint, hf, tmp_path, monkeypatch):
    """slime keeps objects of its own in the arguments; conversion needs neither them nor slime."""
    elsewhere = types.ModuleType("somebodys_arguments")
    option = type("Option", (), {"__module__": elsewhere.__name__, "__qualname__": "Option"})
    elsewhere.Option = option
    kept = checkpoint / "release" / "common.pt"
    common = torch.load(kept, weights_only=False)
    common["args"].eval_datasets = [option()]
    common["args"].eval_datasets[0].__dict__.update(name="sums", samples=2)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, elsewhere.__name__, elsewhere)
        torch.save(common, kept)
    with pytest.raises(ModuleNotFoundError):
        torch.load(kept, weights_only=False)
    out = tmp_path / "back"
    megatron.megatron_to_hf(checkpoint, out, hf)
    assert (out / "config.json").is_file()


# --- Full disks


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


def test_opening_says_which_step_is_missing(checkpoint):
    with pytest.raises(UserError, match="iter_0000005 is not there"):
        torch_dist.open_checkpoint(checkpoint, "5")
