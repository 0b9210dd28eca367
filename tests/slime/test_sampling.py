"""Dynamic filter that ends, length penalty, SFT samples, mismatch: against slime's own where it is there."""

from __future__ import annotations

import sys
import types
from argparse import Namespace
from dataclasses import dataclass

import pytest
import trees

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.slime_plugin import sampling, sft


@dataclass
class Sample:
    """The fields of slime's Sample that are read."""

    reward: float = 0.0
    response_length: int = 10
    group_index: int | None = None
    index: int = 0
    prompt: object = None
    metadata: dict | None = None

    def get_reward_value(self, args):
        return self.reward


@pytest.fixture
def filter_types(monkeypatch):
    @dataclass
    class DynamicFilterOutput:
        keep: bool
        reason: str | None = None

    module = types.ModuleType("slime.rollout.filter_hub.base_types")
    module.DynamicFilterOutput = DynamicFilterOutput
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sampling, "_dropped_in_a_row", [])


def group(*rewards):
    return [Sample(reward=r) for r in rewards]


def test_the_filter_ends_on_all_zero_groups(filter_types):
    args = Namespace(over_sampling_batch_size=3)
    for _ in range(11):
        assert not sampling.reward_varies(args, group(0, 0)).keep
    with pytest.raises(UserError, match=r"12 groups one after another .*needs </think>"):
        sampling.reward_varies(args, group(0, 0))
    for _ in range(50):  # a kept group starts the count anew
        assert sampling.reward_varies(args, group(0, 1)).keep
        assert not sampling.reward_varies(args, group(1, 1)).keep


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0), (7168, 0), (7680, -0.5), (8192, -1.0), (9000, -1.0)]
)
def test_length_penalty_of_stage_1(length, penalty):
    assert sampling.length_penalty(length, 8192, 1024, 1.0) == pytest.approx(penalty)


def test_penalized_rewards_are_normalized_in_their_groups():
    args = Namespace(
        rollout_max_response_len=8192, advantage_estimator="grpo", rewards_normalization=True,
        grpo_std_normalization=True, n_samples_per_prompt=2,
    )  # fmt: skip
    samples = [Sample(1, 100), Sample(1, 8192), Sample(0, 100), Sample(0, 100)]
    raw, shaped = sampling.penalize_length(args, samples)
    assert raw == [1, 1, 0, 0]
    assert shaped[0] > 0 > shaped[1] and shaped[2:] == [0, 0]
    assert sum(shaped) == pytest.approx(0)


SLIME = r"""
from argparse import Namespace
import torch, ast, inspect, textwrap, sys, pathlib
from megatron_fp8_ext.slime_plugin import sampling
# slime's own normalization, taken out of the class (its module needs SGLang's CUDA wheel to import)
source = pathlib.Path(sys.argv[1], "slime/ray/rollout.py").read_text()
node = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == "_post_process_rewards")
node.args.args[1].annotation = None
space = {"torch": torch}
exec(compile(ast.Module([node], []), "slime", "exec"), space)
class S:
    def __init__(self, r): self.reward, self.response_length, self.group_index = r, 5, None
    def get_reward_value(self, args): return self.reward
torch.manual_seed(0)
samples = [S(float(r)) for r in torch.randint(0, 3, (32,))]
for estimator in ("grpo", "reinforce_plus_plus_baseline", "ppo"):
    args = Namespace(advantage_estimator=estimator, rewards_normalization=True, grpo_std_normalization=True,
        n_samples_per_prompt=8, rollout_batch_size=4, rollout_max_response_len=100, length_penalty_buffer=10)
    me = Namespace(custom_reward_post_process_func=None, args=args)
    want, got = space["_post_process_rewards"](me, samples), sampling.penalize_length(args, samples)
    assert want[0] == got[0]
    torch.testing.assert_close(torch.tensor(want[1]), torch.tensor(got[1]), atol=1e-5, rtol=1e-5)
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
assert isinstance(sampling.reward_varies(Namespace(over_sampling_batch_size=4), samples[:8]), DynamicFilterOutput)
print("SAME")
"""


@pytest.mark.slime
@pytest.mark.parametrize("tree", trees.params())
def test_normalization_is_slimes_own(tree):
    done = trees.python(tree, SLIME, str(tree))
    assert "SAME" in done.stdout, done.stderr[-3000:]


class Masks:
    """A mask generator whose samples say their own tokens and mask."""

    def get_loss_mask(self, prompt, **tools):
        return prompt


def sft_args(**changes):
    base = {
        "use_dynamic_batch_size": True,
        "max_tokens_per_gpu": 4,
        "context_parallel_size": 2,
        "rollout_batch_size": 2,
    }
    return Namespace(**{**base, **changes})


@pytest.mark.parametrize(
    ("tokens", "mask", "reason"),
    [
        (5, [0, 0, 1, 1, 0], None),
        (5, [0] * 5, "without response tokens"),
        (9, [0] * 8 + [1], "longer than 8 tokens"),
        (3, [1, 1, 1], "that begin with a response"),
        (3, [0, 1], "with a mask of another length than its tokens"),
    ],
)
def test_samples_that_cannot_be_trained_on(tokens, mask, reason):
    sample = Sample(prompt=(list(range(tokens)), mask))
    assert sft.prepare(sft_args(), sample, Masks()) == reason
    if reason is None:
        assert (sample.response_length, sample.loss_mask) == (3, [1, 1, 0])


def test_too_long_truncates_or_fails_when_asked():
    long = Sample(prompt=(list(range(9)), [0, 1] * 4 + [1]))
    assert sft.prepare(sft_args(sft_too_long="truncate"), long, Masks()) is None
    assert len(long.tokens) == 8
    with pytest.raises(UserError, match="9 tokens"):
        sft.prepare(sft_args(sft_too_long="fail"), long, Masks())


def test_a_batch_is_always_full_or_the_data_is_at_fault(monkeypatch):
    monkeypatch.setattr(sft, "_mask_generator", lambda args: Masks())

    class Source:
        def __init__(self, good):
            self.good, self.drawn = good, 0

        def get_samples(self, count):
            out = []
            for _ in range(count):
                self.drawn += 1
                mask = [0, 1] if self.drawn % self.good == 0 else [0, 0]
                out.append([Sample(prompt=([1, 2], mask))])
            return out

    groups = sft.sft_rollout(sft_args(), 0, Source(good=3))
    assert len(groups) == 2 and all(g[0].response_length == 1 for g in groups)
    with pytest.raises(UserError, match=r"0 of 2 samples are usable .* without response tokens"):
        sft.sft_rollout(sft_args(), 0, Source(good=10**9))


def test_mismatch_is_zero_for_equal_and_refused_for_a_lost_push():
    torch = pytest.importorskip("torch")
    from megatron_fp8_ext.slime_plugin import mismatch

    torch.manual_seed(0)
    logits = torch.randn(4096, 64)
    tokens = torch.distributions.Categorical(logits=logits).sample()

    def log_probs(x):
        return torch.log_softmax(x, -1).gather(1, tokens[:, None])[:, 0]

    here, mask = log_probs(logits), torch.ones(4096)
    same = mismatch.from_totals(mismatch.totals(here, here, mask))
    assert (same.train_rollout_kl, same.train_rollout_logprob_max_diff) == (0, 0)
    near = mismatch.from_totals(
        mismatch.totals(log_probs(logits + 0.02 * torch.randn_like(logits)), here, mask)
    )
    mismatch.check(near, 0, mismatch.DEFAULT_LIMIT)
    other = logits + 0.5 * torch.randn_like(logits)
    far = mismatch.from_totals(mismatch.totals(log_probs(other), here, mask))
    exact = (logits.softmax(-1) * (logits.log_softmax(-1) - other.log_softmax(-1))).sum(-1).mean()
    assert far.train_rollout_kl == pytest.approx(exact.item(), rel=0.1)
    with pytest.raises(UserError, match="do not run the trained weights"):
        mismatch.check(far, 0, mismatch.DEFAULT_LIMIT)
    with pytest.raises(UserError):
        mismatch.check(mismatch.Mismatch(float("nan"), float("nan"), float("nan")), 0, 0.1)
    # masked tokens do not count
    broken = here.clone()
    broken[0] = -1e9
    mask[0] = 0
    assert mismatch.from_totals(mismatch.totals(here, broken, mask)).train_rollout_kl == 0
