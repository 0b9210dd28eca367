"""Loss of released weights when only weights, only inputs, or both are cast, before any training.

python forward_noise.py RELEASED TEXT.bin    (of `megatron-fp8 compare --prepare ... smollm2-cpt`: start/)
"""

import sys

import numpy
import torch
from transformers import AutoModelForCausalLM

from megatron_fp8_ext.fp8 import reference

released, corpus = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32, local_files_only=True)
tokens = numpy.fromfile(corpus, dtype=numpy.uint16)[100_000 : 100_000 + 4 * 1025]
ids = torch.from_numpy(tokens.astype(numpy.int64)).view(4, 1025)
linears = [
    module
    for name, module in model.named_modules()
    if isinstance(module, torch.nn.Linear) and "layers." in name
]
originals = [linear.weight.data.clone() for linear in linears]


def loss(scales, weights, inputs):
    """Mean loss of four sequences of 1024 tokens."""

    def cast_input(_, arguments):
        x = arguments[0]
        rows = reference.quantize_rows(x.reshape(-1, x.shape[-1]).bfloat16(), scales)
        return (rows.dequantize(torch.float32).view_as(x),)

    for linear, original in zip(linears, originals, strict=True):
        linear.weight.data = original
        if weights:
            cast = reference.quantize_weight(original.bfloat16(), scales)
            linear.weight.data = cast.dequantize(torch.float32)
    hooks = [linear.register_forward_pre_hook(cast_input) for linear in linears if inputs]
    with torch.no_grad():
        scores = model(ids[:, :-1]).logits.flatten(0, 1)
    for hook in hooks:
        hook.remove()
    return torch.nn.functional.cross_entropy(scores, ids[:, 1:].flatten()).item()


base = loss("float32", False, False)
print(f"nothing cast: {base:.4f}")
for scales in ("power_of_two", "float32"):
    for weights, inputs in ((True, False), (False, True), (True, True)):
        found = loss(scales, weights, inputs)
        what = " and ".join(["weights"] * weights + ["inputs"] * inputs)
        print(f"{scales} scales, {what} cast: {found:.4f} ({found / base - 1:+.2%})")
