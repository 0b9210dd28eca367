"""The slime seam: what slime's dotted paths point at. docs/rl.md says how to use it.

slime loads `package.module.function` in its Ray workers, so every name below is a value for one of its flags:

    --custom-megatron-init-path               megatron_fp8_ext.slime_plugin.init
    --custom-loss-function-path               megatron_fp8_ext.slime_plugin.sft_loss
    --rollout-function-path                   megatron_fp8_ext.slime_plugin.sft_rollout
    --dynamic-sampling-filter-path            megatron_fp8_ext.slime_plugin.reward_varies
    --custom-reward-post-process-path         megatron_fp8_ext.slime_plugin.penalize_length

Files: transport (the recipe through the environment), checkout (find slime), leftovers (flags nobody read),
launch (entrypoints/train_slime.py), preflight (checks before anything starts), actor (init, in each train
actor), reduction and sft (gradient scale, loss, samples), weights (the FP8 push), local_layers (their
names), mismatch (train against
rollout), sampling (filter, length penalty), stages (the reference's RL settings), examine (doctor --slime).
"""

from __future__ import annotations

from megatron_fp8_ext.slime_plugin.actor import init
from megatron_fp8_ext.slime_plugin.sampling import penalize_length, reward_varies
from megatron_fp8_ext.slime_plugin.sft import sft_loss, sft_rollout

__all__ = ["init", "penalize_length", "reward_varies", "sft_loss", "sft_rollout"]
