"""The reference's two RL stages as data: GRPO on dapo-math-17k, answers shrunk to 8k, then let grow to 16k.

Source: scripts/RL/InfiR2_RL_FP8_7B_stage{1,2}_4node.sh of InfiXAI/InfiR2 (d3a5456). The stages differ in
length, temperature and tokens per GPU, and in nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fp8_ext.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RLStage:
    """One stage of GRPO.

    Attributes:
        name: such as `1`.
        summary: one line.
        max_response_tokens: longest answer that is sampled.
        temperature: of the rollout.
        max_tokens_per_gpu: size of a dynamic micro-batch.
        prompts: prompts of a step.
        samples_per_prompt: answers to each, GRPO's group.
        over_sampling: prompts drawn at a time, of which groups of equal reward are dropped.
        rollouts: steps at most.
        eps_clip: lower clip of the policy ratio, 1 - eps.
        eps_clip_high: upper clip, 1 + eps.
        tis: truncated importance sampling between rollout and training.
        lr: constant learning rate.
        penalty_buffer: tokens before the limit over which the optional length penalty falls to -1.
    """

    name: str
    summary: str
    max_response_tokens: int
    temperature: float
    max_tokens_per_gpu: int
    prompts: int = 128
    samples_per_prompt: int = 16
    over_sampling: int = 384
    rollouts: int = 10240
    eps_clip: float = 0.2
    eps_clip_high: float = 0.28
    tis: bool = True
    lr: float = 1e-6
    penalty_buffer: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.eps_clip <= self.eps_clip_high:
            raise UserError(f"RL stage {self.name}: 0 < eps_clip <= eps_clip_high must hold")
        if self.over_sampling < self.prompts:
            raise UserError(f"RL stage {self.name}: over_sampling must be at least prompts")

    def flags(self, length_penalty: bool = False) -> list[str]:
        """Return slime's flags. Paths, the model and the parallel layout are the user's.

        Args:
            length_penalty: add the penalty that the reference leaves commented out.
        """
        batch = self.prompts * self.samples_per_prompt
        text = (
            "--advantage-estimator grpo --use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl "
            f"--entropy-coef 0.00 --eps-clip {self.eps_clip} --eps-clip-high {self.eps_clip_high} "
            f"--num-rollout {self.rollouts} --rollout-batch-size {self.prompts} "
            f"--n-samples-per-prompt {self.samples_per_prompt} --global-batch-size {batch} "
            f"--over-sampling-batch-size {self.over_sampling} --rollout-shuffle --balance-data "
            f"--rollout-max-response-len {self.max_response_tokens} "
            f"--rollout-temperature {self.temperature} "
            "--dynamic-sampling-filter-path megatron_fp8_ext.slime_plugin.reward_varies "
            f"--use-dynamic-batch-size --max-tokens-per-gpu {self.max_tokens_per_gpu} "
            f"--optimizer adam --lr {self.lr} --lr-decay-style constant --weight-decay 0.1 "
            "--adam-beta1 0.9 --adam-beta2 0.98 --attention-dropout 0.0 --hidden-dropout 0.0 "
            "--accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32"
        )
        out = text.split()
        if self.tis:
            out.append("--use-tis")
        if length_penalty:
            out += [
                "--custom-reward-post-process-path", "megatron_fp8_ext.slime_plugin.penalize_length",
                "--length-penalty-buffer", str(self.penalty_buffer),
            ]  # fmt: skip
        return out


STAGES = {
    "1": RLStage(
        name="1",
        summary="shrink: answers up to 8k tokens, temperature 1.0",
        max_response_tokens=8192,
        temperature=1.0,
        max_tokens_per_gpu=8192,
    ),
    "2": RLStage(
        name="2",
        summary="grow: answers up to 16k tokens, temperature 1.1",
        max_response_tokens=16384,
        temperature=1.1,
        max_tokens_per_gpu=16384,
    ),
}
