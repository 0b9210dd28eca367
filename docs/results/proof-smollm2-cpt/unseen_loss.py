"""A `--score`: a checkpoint's mean loss in BF16 on text that training did not see (sympy's sources)."""

import json
import sys
from pathlib import Path

import sympy
import torch
from transformers import AutoTokenizer

from megatron_fp8_ext.checkpoint import logits

checkpoint, reference = map(Path, sys.argv[1:])
tokenizer = AutoTokenizer.from_pretrained(reference, local_files_only=True)
files = sorted((Path(sympy.__file__).parent / "core").glob("*.py"))
text = "\n".join(file.read_text(errors="replace") for file in files)
ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
rows = ids[: min(len(ids) // 1025, 300) * 1025].view(-1, 1025)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = logits.load_model(checkpoint, (reference,)).to(device, torch.bfloat16).eval()
total = 0.0
with torch.no_grad():
    for batch in rows.to(device).split(10):
        scores = model(batch[:, :-1]).logits.float().flatten(0, 1)
        total += torch.nn.functional.cross_entropy(
            scores, batch[:, 1:].flatten(), reduction="sum"
        ).item()
print(json.dumps({"BF16 loss on unseen code": total / (rows.shape[0] * 1024)}))
