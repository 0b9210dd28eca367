"""Supervised fine-tuning through slime: the InfiAlign loss and the samples it is fed.

The loss is the sum of response-token negative log-likelihoods over the global batch divided by the number of
response tokens of the global batch. slime supplies the sharded log-probabilities, Megatron the division
(`--calculate-per-token-loss`), `reduction` the right scale.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.slime_plugin import reduction

POLICIES = ("drop", "truncate", "fail")
# Draws for one batch before we say that the data is at fault.
_MAX_DRAWS = 50


def sft_loss(
    args: Any, batch: Any, logits: Any, sum_of_sample_mean: Callable[[Any], Any]
) -> tuple[Any, dict[str, Any]]:
    """InfiAlign's SFT loss. Value of `--custom-loss-function-path`, with `--loss-type custom_loss`.

    Args:
        args: slime's arguments.
        batch: slime's micro-batch: `unconcat_tokens`, `total_lengths`, `response_lengths`.
        logits: `[1, T, V / tensor parallel]`.
        sum_of_sample_mean: slime's reduction; under `--calculate-per-token-loss` the masked sum of tokens.

    Returns:
        The FP32 sum over this micro-batch's response tokens, and {"loss": the same, detached}.

    Raises:
        UserError: the mean is not over tokens, a sample has no response, or nobody mended the scale.
    """
    if not args.calculate_per_token_loss:
        raise UserError(
            "megatron_fp8_ext.slime_plugin.sft_loss is a mean over response tokens: add "
            "--calculate-per-token-loss"
        )
    if not reduction.installed():
        raise UserError(
            "megatron_fp8_ext.slime_plugin.sft_loss needs --custom-megatron-init-path "
            "megatron_fp8_ext.slime_plugin.init, which mends slime's gradient scale"
        )
    if any(length == 0 for length in batch["response_lengths"]):
        raise UserError(
            "a sample without response tokens reached the loss: use --rollout-function-path "
            "megatron_fp8_ext.slime_plugin.sft_rollout, which leaves such samples out"
        )
    import torch

    slime_loss = importlib.import_module("slime.backends.megatron_utils.loss")
    found = slime_loss.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=False,
    )
    found = found[1] if isinstance(found, tuple) else found  # a pair since v0.2
    log_probs = torch.cat(found["log_probs"], dim=0)
    loss = -sum_of_sample_mean(log_probs)
    if log_probs.numel() == 0:  # a context-parallel rank without response tokens
        loss = loss + 0 * logits.sum()
    return loss, {"loss": loss.clone().detach()}


def sft_rollout(
    args: Any, rollout_id: int, data_source: Any, evaluation: bool = False
) -> list[Any]:
    """Draw, tokenize and mask one batch of conversations. Value of `--rollout-function-path`.

    As slime's own `sft_rollout`, except that a batch is always full of usable samples: one without a response
    is left out, one that is too long is treated as `--sft-too-long` says (drop, truncate, fail), and each is
    replaced by the next of the data source.

    Returns:
        `--rollout-batch-size` groups of one sample.

    Raises:
        UserError: `fail` was asked for, or too few samples of the data are usable.
    """
    if evaluation:
        raise UserError("sft_rollout has no evaluation: drop --eval-interval")
    generator = _mask_generator(args)
    wanted = args.rollout_batch_size
    reasons: dict[str, int] = {}
    groups: list[Any] = []
    for group in _draws(data_source, wanted, lambda: len(groups) >= wanted):
        (sample,) = group
        reason = prepare(args, sample, generator)
        if reason is None:
            groups.append(group)
        else:
            reasons[reason] = reasons.get(reason, 0) + 1
    if len(groups) < wanted:
        raise UserError(
            f"SFT batch {rollout_id}: {len(groups)} of {wanted} samples are usable after "
            f"{_MAX_DRAWS} draws of "
            f"the data: {_shown(reasons)}; look at the chat template (--loss-mask-type) and --sft-too-long"
        )
    if reasons:
        print(f"megatron_fp8_ext: SFT batch {rollout_id}: left out {_shown(reasons)}", flush=True)
    return groups


def _draws(data_source: Any, wanted: int, full: Callable[[], bool]) -> Iterator[Any]:
    """Yield groups until the batch is full; every draw asks for a full batch at first, then singly."""
    yield from data_source.get_samples(wanted)
    for _ in range(_MAX_DRAWS * wanted):
        if full():
            return
        yield from data_source.get_samples(1)


def _shown(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))


def prepare(args: Any, sample: Any, generator: Any) -> str | None:
    """Set tokens, mask and length of one sample, or return why it cannot be used.

    Raises:
        UserError: it is too long under `--sft-too-long fail`, or the policy is unknown.
    """
    policy = getattr(args, "sft_too_long", "drop")
    if policy not in POLICIES:
        raise UserError(f"--sft-too-long {policy}: choose {', '.join(POLICIES)}")
    tools = (sample.metadata or {}).get("tools")
    extra = {"tools": tools} if tools is not None else {}
    tokens, mask = generator.get_loss_mask(sample.prompt, **extra)
    if len(tokens) != len(mask):
        return "with a mask of another length than its tokens"
    limit = longest_sample(args)
    if limit is not None and len(tokens) > limit:
        if policy == "fail":
            raise UserError(
                f"sample {sample.index} has {len(tokens)} tokens and --max-tokens-per-gpu leaves room for "
                f"{limit}; use --sft-too-long drop or truncate, or raise the limit"
            )
        if policy == "drop":
            return f"longer than {limit} tokens"
        tokens, mask = tokens[:limit], mask[:limit]
    if 1 not in mask:
        return "without response tokens"
    first = mask.index(1)
    if first == 0:
        return "that begin with a response"  # nothing predicts the first token
    sample.tokens = list(tokens)
    sample.response_length = len(mask) - first
    sample.loss_mask = list(mask[first:])
    sample.reward = 0
    return None


def longest_sample(args: Any) -> int | None:
    """Return the most tokens one sample may have: what the context-parallel ranks hold together."""
    if not getattr(args, "use_dynamic_batch_size", False) or args.max_tokens_per_gpu is None:
        return None
    return int(args.max_tokens_per_gpu) * int(getattr(args, "context_parallel_size", 1) or 1)


_generators: dict[tuple[str, str], Any] = {}


def _mask_generator(args: Any) -> Any:
    """Return slime's mask generator for the run's tokenizer; no remote code unless asked for."""
    key = (args.hf_checkpoint, args.loss_mask_type)
    if key not in _generators:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            args.hf_checkpoint, trust_remote_code=getattr(args, "trust_remote_code", False)
        )
        masks = importlib.import_module("slime.utils.mask_utils")
        _generators[key] = masks.MultiTurnLossMaskGenerator(
            tokenizer, tokenizer_type=args.loss_mask_type
        )
    return _generators[key]
