"""Checks of a run on packed samples, on the parsed command, before anything expensive starts."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import run
from megatron_fp8_ext.megatron_plugin.packed_data import pack_multiple
from megatron_fp8_ext.sft.shards import SampleShards, fingerprint


def check(args: Any, own_script: bool) -> None:
    """Check a parsed command; sets `train_iters` from --sft-epochs.

    Args:
        args: Megatron's parsed arguments, before `validate_args`.
        own_script: whether an entry script of ours runs.

    Raises:
        UserError: says what is wrong, by which flag, and how to mend it.
    """
    if getattr(args, "sft_data", None) is None:
        if own_script and getattr(args, "dataloader_inter_document_masking", False):
            _documents(args)
        return
    if not own_script:
        raise UserError(
            "--sft-data needs our entry script: run entrypoints/pretrain_gpt.py (or python -m "
            "megatron_fp8_ext.megatron_plugin.pretrain_gpt) instead, with the same flags"
        )
    data = _open("--sft-data", args.sft_data, args)
    if args.sft_valid_data:
        _open("--sft-valid-data", args.sft_valid_data, args)
    args.sft_fingerprint = fingerprint(data.index)
    _capacity(args)
    if args.sft_epochs is not None:
        _epochs(args, data)


def resume_on_the_same_data(module: ModuleType) -> None:
    """Stop a run that would continue the sample count of a checkpoint on other samples."""
    original = module.check_checkpoint_args

    def check_checkpoint_args(stored: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        ours = (get_args().sft_fingerprint, get_args().seed, get_args().pack_scope)
        theirs = tuple(getattr(stored, n, None) for n in ("sft_fingerprint", "seed", "pack_scope"))
        if getattr(stored, "consumed_train_samples", 0) and ours != theirs:
            what = "other samples" if ours[0] != theirs[0] else "another --seed or --pack-scope"
            raise run.stop(
                UserError(
                    f"--load: the checkpoint was trained on {what}, so its place in them means nothing "
                    "here; add --finetune to start this data from its weights"
                )
            )
        return original(stored, *args, **kwargs)

    module.check_checkpoint_args = check_checkpoint_args  # type: ignore[attr-defined]


def _open(flag: str, folder: str, args: Any) -> SampleShards:
    try:
        data = SampleShards(folder)
    except UserError as error:
        raise UserError(str(error).replace("--sft-data", flag)) from error
    if len(data) == 0:
        raise UserError(f"{flag} {folder} holds no samples; pack it again from more data")
    longest = data.longest
    if args.seq_length is not None and longest > args.seq_length:
        raise UserError(
            f"{flag} {folder}: its longest sample has {longest} tokens, --seq-length is "
            f"{args.seq_length}; use --seq-length {data.index['seq_length']}, or pack again with a "
            "shorter one"
        )
    _tokenizer(flag, folder, data, args)
    return data


def _tokenizer(flag: str, folder: str, data: SampleShards, args: Any) -> None:
    """The model must know every token; a tokenizer given by path must be the shards' own."""
    stored = data.index["tokenizer"]
    size = getattr(args, "vocab_size", None)
    if size is not None and size < stored["vocab_size"]:
        raise UserError(
            f"{flag} {folder} was packed with a tokenizer of {stored['vocab_size']} tokens, "
            f"--vocab-size is {size}; use the model's own tokenizer in `data pack`"
        )
    path = getattr(args, "tokenizer_model", None)
    if path is None or not os.path.exists(path):
        return
    from megatron_fp8_ext import tokenizer

    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if file.suffix not in (".json", ".gguf") or not file.is_file():
        return
    loaded, _ = tokenizer.load(path)
    if tokenizer.fingerprint(loaded) != stored["tokenizer"]:
        raise UserError(
            f"{flag} {folder} was packed with another tokenizer than --tokenizer-model {path}; pack "
            "it again with this one"
        )


def _capacity(args: Any) -> None:
    multiple = pack_multiple(args)
    if args.seq_length is None:
        return  # Megatron itself asks for it
    if args.seq_length % multiple:
        low = max(args.seq_length // multiple, 1) * multiple
        high = -(-args.seq_length // multiple) * multiple
        raise UserError(
            f"--seq-length {args.seq_length}: packs are multiples of {multiple} tokens here (128 x "
            f"ranks that split a sequence); use {' or '.join(map(str, sorted({low, high})))}"
        )
    model = (args.tensor_model_parallel_size or 1) * (args.pipeline_model_parallel_size or 1)
    ranks = int(os.environ.get("WORLD_SIZE", "1")) // (model * (args.context_parallel_size or 1))
    if ranks and args.global_batch_size % ranks:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of the {ranks} "
            f"data-parallel ranks; use {math.ceil(args.global_batch_size / ranks) * ranks}"
        )


def _epochs(args: Any, data: SampleShards) -> None:
    if args.sft_epochs < 1:
        raise UserError(f"--sft-epochs {args.sft_epochs}: use 1 or more")
    if args.train_iters or args.train_samples:
        written = "--train-iters" if args.train_iters else "--train-samples"
        raise UserError(f"--sft-epochs contradicts {written}: drop one of the two")
    if args.pack_scope != "batch":
        raise UserError("--sft-epochs counts samples; with --pack-scope epoch give --train-iters")
    args.train_iters = args.sft_epochs * len(data) // args.global_batch_size
    if args.train_iters == 0:
        raise UserError(
            f"--sft-epochs {args.sft_epochs}: {len(data)} samples make no global batch of "
            f"{args.global_batch_size}; use a smaller --global-batch-size"
        )


def _documents(args: Any) -> None:
    flag = "--dataloader-inter-document-masking"
    for wrong, other, reason in (
        ((args.context_parallel_size or 1) > 1, "--context-parallel-size",
         "documents cannot be cut into equal parts for its ranks"),
        ((args.pipeline_model_parallel_size or 1) > 2, "--pipeline-model-parallel-size above 2",
         "middle stages do not see the tokens"),
        ((args.pipeline_model_parallel_size or 1) > 1 and (args.micro_batch_size or 1) > 1,
         "--micro-batch-size above 1 in a pipeline", "stages exchange rows of one sequence"),
        (args.reset_attention_mask, "--reset-attention-mask", "it says the same, by a dense mask"),
    ):  # fmt: skip
        if wrong:
            raise UserError(f"{flag} contradicts {other}: {reason}; drop one of the two")
