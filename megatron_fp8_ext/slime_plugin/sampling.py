"""Which groups of answers are trained on, and what an answer's length costs."""

from __future__ import annotations

import importlib
import math
from typing import Any

from megatron_fp8_ext.errors import UserError

# Groups dropped one after another before the rollout is given up, in draws of --over-sampling-batch-size.
MAX_DROPPED_DRAWS = 4
_dropped_in_a_row: list[float] = []


def reward_varies(args: Any, samples: list[Any], **unused: Any) -> Any:
    """Keep groups whose rewards differ. Value of `--dynamic-sampling-filter-path`.

    As slime's `check_reward_nonzero_std`, which drops for ever when no group ever differs: a model without
    `</think>` gets 0 from the deepscaler reward in every answer. Here that ends in one clear error.

    Returns:
        slime's DynamicFilterOutput.

    Raises:
        UserError: `--max-dropped-groups` groups (4 draws by default) were dropped one after another.
    """
    types = _filter_types()
    rewards = [float(s.get_reward_value(args)) for s in flatten(samples)]
    if max(rewards) - min(rewards) > 1e-6:
        _dropped_in_a_row.clear()
        return types.DynamicFilterOutput(keep=True, reason=None)
    _dropped_in_a_row.append(rewards[0])
    limit = getattr(args, "max_dropped_groups", None)
    if limit is None:
        limit = MAX_DROPPED_DRAWS * args.over_sampling_batch_size
    if len(_dropped_in_a_row) >= limit:
        seen = sorted({round(r, 3) for r in _dropped_in_a_row})
        _dropped_in_a_row.clear()
        hint = (
            "the reward finds no right answer: is its answer format the model's? "
            "(deepscaler needs </think> or "
            "###Response)"
            if seen == [0.0]
            else "the prompts are too easy or too hard for this model"
        )
        raise UserError(
            f"{limit} groups one after another had equal rewards "
            f"({', '.join(map(str, seen[:5]))}), so no group "
            f"can be trained on: {hint}; raise --max-dropped-groups to sample on"
        )
    return types.DynamicFilterOutput(keep=False, reason=f"zero_std_{round(rewards[0], 1)}")


def _filter_types() -> Any:
    try:
        return importlib.import_module("slime.rollout.filter_hub.base_types")
    except ImportError as error:
        raise UserError(f"reward_varies runs inside slime, which is not here: {error}") from error


def flatten(samples: list[Any]) -> list[Any]:
    """Return a group's samples; slime HEAD may hand over lists of them (one rollout, many samples)."""
    out: list[Any] = []
    for sample in samples:
        out.extend(sample if isinstance(sample, list) else [sample])
    return out


def length_penalty(length: int, longest: int, buffer: int, factor: float) -> float:
    """Return what is added to the reward: 0 up to `longest - buffer` tokens, then down to -factor.

    The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13), which the reference's RL scripts
    name but leave commented out: buffer 1024, factor 1.0, longest 8192 in stage 1 and 16384 in stage 2.
    """
    if buffer <= 0:
        return 0.0 if length <= longest else -factor
    over = (length - (longest - buffer)) / buffer
    return -factor * min(max(over, 0.0), 1.0)


def penalize_length(args: Any, samples: list[Any]) -> tuple[list[float], list[float]]:
    """Rewards less the length penalty, normalized in their groups. For `--custom-reward-post-process-path`.

    Evaluation never comes here. Lengths are limited by `--rollout-max-response-len`;
    `--length-penalty-buffer` (1024) and `--length-penalty-factor` (1.0) are ours. The normalization is
    slime's own, by group.

    Returns:
        (rewards as the reward model gave them, for the log; rewards to train on).
    """
    raw = [float(sample.get_reward_value(args)) for sample in samples]
    buffer = getattr(args, "length_penalty_buffer", 1024)
    factor = getattr(args, "length_penalty_factor", 1.0)
    shaped = [
        reward + length_penalty(s.response_length, args.rollout_max_response_len, buffer, factor)
        for reward, s in zip(raw, samples, strict=True)
    ]
    return raw, normalize(args, shaped, [_group(s, i, args) for i, s in enumerate(samples)])


def _group(sample: Any, position: int, args: Any) -> int:
    if sample.group_index is not None:
        return int(sample.group_index)
    return position // int(args.n_samples_per_prompt)


_GROUP_ESTIMATORS = ("grpo", "gspo", "cispo", "reinforce_plus_plus_baseline")


def normalize(args: Any, rewards: list[float], groups: list[int]) -> list[float]:
    """Subtract each group's mean and, for GRPO's kin, divide by its standard deviation (n - 1)."""
    if args.advantage_estimator not in _GROUP_ESTIMATORS or not args.rewards_normalization:
        return rewards
    by_std = args.advantage_estimator != _GROUP_ESTIMATORS[-1] and args.grpo_std_normalization
    members: dict[int, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    out = [0.0] * len(rewards)
    for positions in members.values():
        values = [rewards[p] for p in positions]
        mean = math.fsum(values) / len(values)
        scale = 1.0
        if by_std and len(values) > 1:
            variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
            scale = math.sqrt(variance) + 1e-6
        for position in positions:
            out[position] = (rewards[position] - mean) / scale
    return out
