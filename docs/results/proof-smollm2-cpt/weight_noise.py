"""Loss of released weights under the recipe's cast, the same on shifted grids, and random noise of its size.

python weight_noise.py RELEASED TEXT.bin    (of `megatron-fp8 compare --prepare ... smollm2-cpt`: start/)
"""

import sys

import numpy
import torch
from transformers import AutoModelForCausalLM

from megatron_fp8_ext.fp8 import reference

released, corpus = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32, local_files_only=True)
tokens = numpy.fromfile(corpus, dtype=numpy.uint16)[100_000 : 100_000 + 8 * 1025]
ids = torch.from_numpy(tokens.astype(numpy.int64)).view(8, 1025)
linears = [
    module
    for name, module in model.named_modules()
    if isinstance(module, torch.nn.Linear) and "layers." in name
]
originals = [linear.weight.data.clone() for linear in linears]


def loss():
    """Mean loss of eight sequences of 1024 tokens."""
    with torch.no_grad():
        found = [
            torch.nn.functional.cross_entropy(model(row[None, :-1]).logits[0], row[1:]).item()
            for row in ids
        ]
    return sum(found) / len(found)


def cast(weight, scales="power_of_two"):
    """Return the weight as the recipe's GEMM sees it, FP32."""
    return reference.quantize_weight(weight, scales).dequantize(torch.float32)


def report(what, change):
    """Print the loss with every linear layer's weight changed."""
    for linear, original in zip(linears, originals, strict=True):
        linear.weight.data = change(original)
    print(f"{what}: {loss() / base - 1:+.2%}", flush=True)


base = loss()
print(f"nothing cast: {base:.4f}")
report("powers of two", lambda w: cast(w.bfloat16()))
for shift in (1.15, 1.3, 1.5, 1.7):
    report(f"powers of two times {shift}", lambda w, s=shift: cast(w * s) / s)
report("FP32 scales", lambda w: cast(w.bfloat16(), "float32"))
generator = torch.Generator().manual_seed(0)


def noisy(weight):
    """Return the weight with normal noise of the cast error's mean size in this matrix."""
    size = (cast(weight.bfloat16()) - weight).abs().mean() * 1.2533
    return weight + torch.randn(weight.shape, generator=generator) * size


def shuffled(weight):
    """Return the weight with the cast's errors, each with a random sign."""
    sign = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
    return weight + (cast(weight.bfloat16()) - weight) * sign


for draw in range(3):
    report(f"normal noise, draw {draw}", noisy)
report("the cast's errors with random signs", shuffled)
