"""The start of the loop: a small Qwen2 that was shown sums until it solves some of them.

python -m rl_loop.sft OUT [--stop-at 0.35]
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rl_loop import arithmetic

# Heads of 128, so that training's 128x128 blocks of the fused matrices are those of the split ones.
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LENGTH = 9  # 99+9=108 and the end


def config() -> Qwen2Config:
    return Qwen2Config(
        **SHAPE,
        vocab_size=arithmetic.VOCAB_SIZE,
        max_position_embeddings=64,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        eos_token_id=arithmetic.VOCABULARY[arithmetic.EOS],
        bos_token_id=None,
        pad_token_id=arithmetic.VOCABULARY[arithmetic.PAD],
        dtype="bfloat16",
    )


def batch(pairs: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and labels `[n, LENGTH]`; labels of the question and of padding are -100."""
    end = arithmetic.VOCABULARY[arithmetic.EOS]
    tokens = torch.zeros(len(pairs), LENGTH, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for row, (a, b) in enumerate(pairs):
        asked = arithmetic.encode(arithmetic.question(a, b))
        answer = [*arithmetic.encode(str(a + b)), end]
        whole = torch.tensor(asked + answer)
        tokens[row, : len(whole)] = whole
        labels[row, len(asked) : len(whole)] = whole[len(asked) :]
    return tokens, labels


@torch.no_grad()
def expected_pass_rate(model: Qwen2ForCausalLM, pairs: list[tuple[int, int]]) -> float:
    """Return the mean probability of the right answer: the pass rate of sampling at temperature 1."""
    tokens, labels = batch(pairs)
    log_probs = torch.log_softmax(model(input_ids=tokens).logits[:, :-1].float(), -1)
    wanted = labels[:, 1:]
    picked = log_probs.gather(2, wanted.clamp_min(0)[..., None])[..., 0] * (wanted >= 0)
    return float(picked.sum(1).exp().mean())


def train(out: Path, stop_at: float, seed: int = 1, limit: int = 6000) -> float:
    """Train until the held-out pass rate reaches `stop_at`, save to `out` in BF16; returns the rate."""
    torch.manual_seed(seed)
    order = random.Random(seed)
    shown, held_out = arithmetic.problems()
    model = Qwen2ForCausalLM(config()).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    rate = 0.0
    for step in range(1, limit + 1):
        tokens, labels = batch(order.sample(shown, 128))
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            rate = expected_pass_rate(model, held_out)
            if step % 100 == 0:
                print(f"step {step}: loss {loss.item():.3f}, pass rate {rate:.3f}", flush=True)
            if rate >= stop_at:
                break
    model.to(torch.bfloat16).save_pretrained(out)
    arithmetic.tokenizer().save_pretrained(out)
    print(f"step {step}: pass rate {rate:.3f}", flush=True)
    return rate


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stop-at", type=float, default=0.35)
    chosen = parser.parse_args()
    train(chosen.out, chosen.stop_at)
