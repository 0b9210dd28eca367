"""Checks of a parsed command, before anything expensive starts. Pure but for reading file sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_fp8_ext.checkpoint.layout import CheckpointLayout
from megatron_fp8_ext.checkpoint.state import TrainingState
from megatron_fp8_ext.errors import UserError

# Block-scaled GEMMs need 16 in the contracted dimension: tokens for wgrad, features for the others.
ALIGNMENT = 16


def nearest_multiples(number: int, of: int) -> tuple[int, int]:
    """Return the multiples of `of` just below and just above `number` (below: at least one)."""
    return max(number // of, 1) * of, -(-number // of) * of


def shapes_fit_fp8(args: Any, recipe: str, world_size: int) -> None:
    """Check that every FP8 GEMM of the run has legal dimensions.

    Megatron does not check this, and TransformerEngine fails in the first step (or the backward).

    Args:
        args: Megatron's parsed arguments, before `validate_args`.
        recipe: its name, for the message.
        world_size: number of ranks.

    Raises:
        UserError: names the dimension, its flags and the nearest good values.
    """
    seq = args.seq_length
    if seq is None:
        return  # Megatron itself asks for it
    tp = args.tensor_model_parallel_size or 1
    cp = args.context_parallel_size or 1
    mbs = args.micro_batch_size or 1
    divisor = cp * (tp if args.sequence_parallel and tp > 1 else 1)
    if (mbs * seq) % (divisor * ALIGNMENT):
        # With mbs fixed, seq must bring the missing factors of two.
        step = divisor * ALIGNMENT
        while step % 2 == 0 and mbs * (step // 2) % (divisor * ALIGNMENT) == 0:
            step //= 2
        low, high = nearest_multiples(seq, step)
        spread = f" / {divisor} ranks that split the sequence" if divisor > 1 else ""
        raise UserError(
            f"--fp8-recipe {recipe}: --micro-batch-size {mbs} x --seq-length {seq}{spread} = "
            f"{mbs * seq / divisor:g} tokens for a rank, which is not a multiple of {ALIGNMENT}; "
            f"use --seq-length {low} or {high}"
        )
    for flag, size, parts in (
        ("--hidden-size", args.hidden_size, 1),
        ("--hidden-size", args.hidden_size, tp),
        ("--ffn-hidden-size", args.ffn_hidden_size, tp),
        ("--moe-ffn-hidden-size", getattr(args, "moe_ffn_hidden_size", None), tp),
    ):
        if size is not None and size % (parts * ALIGNMENT):
            low, high = nearest_multiples(size, parts * ALIGNMENT)
            raise UserError(
                f"--fp8-recipe {recipe}: {flag} {size} over {parts} tensor-parallel ranks is not a "
                f"multiple of {ALIGNMENT}; use {low} or {high}"
            )


def corpus_exists(args: Any) -> None:
    """Check that each `--data-path` entry is a readable, non-empty pair of .bin and .idx.

    Raises:
        UserError: names the missing or empty file.
    """
    for prefix in corpora(args):
        for suffix in (".idx", ".bin"):
            file = Path(prefix + suffix)
            if not file.is_file():
                raise UserError(
                    f"--data-path {prefix}: {file} does not exist; write it with `megatron-fp8 data "
                    f"tokenize CORPUS.jsonl --tokenizer DIR --output {prefix}`"
                )
            if file.stat().st_size == 0:
                raise UserError(f"--data-path {prefix}: {file} is empty; write the corpus again")


def corpora(args: Any) -> list[str]:
    """Return the local prefixes that --data-path and its kin name, without their weights."""
    parts: list[str] = []
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        parts += [str(part) for part in getattr(args, name, None) or ()]
    return [part for part in parts if not is_number(part) and "://" not in part]


def is_number(text: str) -> bool:
    """Whether an entry of `--data-path` is a weight."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def checkpoint_fits(args: Any, found: CheckpointLayout | None) -> None:
    """Check that the checkpoint has the shape of the model on the command line.

    Raises:
        UserError: names the first dimension that differs, both values and the flag.
    """
    if found is None or not found.shapes or getattr(args, "use_checkpoint_args", False):
        return
    norm = found.shapes.get("decoder.final_layernorm.weight")
    fc2 = found.shapes.get("decoder.layers.mlp.linear_fc2.weight")
    qkv = found.shapes.get("decoder.layers.self_attention.linear_qkv.weight")
    rows: list[tuple[str, int | None, int | None]] = []
    if norm is not None:
        rows.append(("--hidden-size", args.hidden_size, norm[0]))
    stacked = fc2 or qkv
    if stacked is not None and len(stacked) == 3:
        rows.append(("--num-layers", args.num_layers, stacked[0]))
    if fc2 is not None and args.num_experts is None:
        rows.append(("--ffn-hidden-size", args.ffn_hidden_size, fc2[-1]))
    vocabulary = found.shapes.get("embedding.word_embeddings.weight")
    size = getattr(args, "vocab_size", None)
    if vocabulary is not None and size is not None and size > vocabulary[0]:
        rows.append(("--vocab-size", size, vocabulary[0]))
    for flag, asked, stored in rows:
        if asked is not None and stored is not None and asked != stored:
            raise UserError(
                f"--load: the checkpoint {found.path} has {flag} {stored}, the command says "
                f"{flag} {asked}; give the checkpoint's own values"
            )


def schedule_continues(args: Any, state: TrainingState | None) -> None:
    """Check that the run continues the schedule it began with.

    Megatron stops with a bare assertion on another end, and takes another decay length without a word,
    which makes the learning rate jump.

    Raises:
        UserError: names the length, both values and the mend.
    """
    if state is None or not state.scheduler or not args.global_batch_size:
        return
    chosen = ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler", "finetune")
    if any(getattr(args, name, False) for name in (*chosen, "no_load_optim")):
        return
    base = "samples" if args.train_samples else "iters"
    size = 1 if base == "samples" else args.global_batch_size
    decay = f"lr_wsd_decay_{base}"
    stored = state.args.get(decay)
    rows: list[tuple[str, int | None, float | None]] = [
        ("end", getattr(args, f"lr_decay_{base}"), state.scheduler.get("lr_decay_steps")),
        ("warmup", getattr(args, f"lr_warmup_{base}"), state.scheduler.get("lr_warmup_steps")),
        ("decay", getattr(args, decay), None if stored is None else stored * size),
    ]
    for what, ours, theirs in rows:
        if ours is not None and theirs is not None and ours * size != theirs:
            raise UserError(
                f"{state.path}: the {what} of its schedule is at {theirs / size:g} {base}, the command says "
                f"{ours}: give the same lengths, branch a decay with --wsd-decay-from, or take the new "
                "lengths with --override-opt_param-scheduler (the data is then shuffled anew)"
            )
