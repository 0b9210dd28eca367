"""A GGUF model file as a Hugging Face folder, through transformers (which dequantizes it).

The weights are what the file holds, dequantized and rounded to BF16; GGUF's 4- and 8-bit rounding cannot be
undone. Needs the extra `convert`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_fp8_ext import tokenizer
from megatron_fp8_ext.checkpoint import architecture, huggingface, megatron, output
from megatron_fp8_ext.checkpoint.report import Report, meter
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.files import sync


def gguf_to_hf(source: Path, target: Path) -> Report:
    """Convert a GGUF file of the Llama or Qwen2 family to a BF16 Hugging Face folder.

    Memory: the whole model in FP32, as transformers dequantizes it (1.1 GB for 135M parameters).

    Raises:
        UserError: no such file, a package is missing, another family, or the file is damaged.
    """
    if not source.is_file():
        raise UserError(f"{source} does not exist; give a .gguf file")
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{source} is not a GGUF file")
    counter = meter(source.stat().st_size, None)
    config, state = _load(source)
    arch = architecture.from_config(config, str(source))
    specs = megatron.hf_specs(arch)
    if arch.tied:
        state.pop("lm_head.weight", None)
    missing = sorted(set(specs) ^ set(state))
    if missing:
        raise UserError(f"{source}: {missing[0]} has no counterpart; is it a {arch.family} model?")
    words, _ = tokenizer.load(source)
    with output.folder(target, huggingface.total_bytes(specs)) as partial:
        writer = huggingface.FolderWriter(partial, specs)
        for name in specs:
            writer.write(name, state.pop(name).to(torch.bfloat16))
        writer.finish(config, copy_from=None)
        words.save(str(partial / "tokenizer.json"))
        huggingface.write_json(partial / "tokenizer_config.json", _tokenizer_config(source, words))
        with (partial / "tokenizer.json").open("rb") as file:
            sync(file)
    note = (
        f"dequantized by transformers and rounded to BF16; vocabulary of {words.get_vocab_size()}"
    )
    return Report(target, len(specs), source.stat().st_size, counter.seconds, (note,))


def _load(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        import gguf  # noqa: F401  # transformers asks for it late and at length
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UserError(
            f'GGUF needs the package {error.name}: pip install "megatron-fp8-ext[convert]"'
        ) from error
    try:
        where: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
    except Exception as error:  # transformers and gguf fail in any way
        line = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: transformers cannot load it: {line}") from error
    settings = json.loads(model.config.to_json_string(use_diff=False))
    settings["architectures"] = [type(model).__name__]
    settings["dtype"] = "bfloat16"
    # GGUF stores it as FP32: 1e-05 comes back as 9.999999747378752e-06.
    settings["rms_norm_eps"] = float(f"{settings['rms_norm_eps']:g}")
    for name in (
        "quantization_config",
        "_name_or_path",
        "_model_name_or_path",
        "transformers_version",
    ):
        settings.pop(name, None)
    return settings, dict(model.state_dict())


def _tokenizer_config(source: Path, words: Any) -> dict[str, Any]:
    import gguf

    fields = gguf.GGUFReader(source).fields

    def token(kind: str) -> str | None:
        field = fields.get(f"tokenizer.ggml.{kind}_token_id")
        found: str | None = words.id_to_token(int(field.contents())) if field is not None else None
        return found

    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    for kind, name in names.items():
        if token(kind) is not None:
            settings[name] = token(kind)
    template = fields.get("tokenizer.chat_template")
    if template is not None:
        settings["chat_template"] = template.contents()
    return settings
