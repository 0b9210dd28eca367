"""A small tokenizer of bytes, a ChatML template with tools of the shape of Qwen2.5's, conversations."""

from __future__ import annotations

import json
from pathlib import Path

CHATML = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}"
    "{%- else %}{{- 'You help.' }}{%- endif %}"
    "{{- '\\n<tools>' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}"
    "{{- '\\n</tools><|im_end|>\\n' }}"
    "{%- elif messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' or (m.role == 'system' and not loop.first)"
    " or (m.role == 'assistant' and not m.tool_calls) %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}"
    "{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant' }}"
    "{%- if m.content %}{{- '\\n' + m.content }}{%- endif %}"
    "{%- for c in m.tool_calls %}{%- if c.function is defined %}{%- set c = c.function %}{%- endif %}"
    "{{- '\\n<tool_call>\\n' + c.name + ' ' + (c.arguments | tojson) + '\\n</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- elif m.role == 'tool' %}"
    "{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}"
    "{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
)

# Conversations that masks are compared on.
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, "é"]}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
U, A = (
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\nx</think>4"},
)
CASES = {
    "single": [U, A],
    "multi": [U, A, {"role": "user", "content": "the 😀 more"}, {**A, "content": "é\n\nok the end"}],
    "system": [{"role": "system", "content": "Be brief."}, U, A],
    "late system": [U, A, {"role": "system", "content": "Now rhyme."}, U, A],
    "begins with newlines": [U, {**A, "content": "\n\n\nok"}, U, {**A, "content": "\nyes"}],
    "begins with bytes": [U, {**A, "content": "😀 ok"}],
    "step off": [U, {**A, "step_loss_mask": 0}, U, A],
    "tool": [U, {"role": "assistant", "content": "", "tool_calls": [CALL]},
             {"role": "tool", "content": "5"}, A],
    "two tools": [U, {"role": "assistant", "content": "hm", "tool_calls": [CALL, CALL]},
                  {"role": "tool", "content": "5"}, {"role": "tool", "content": "6"}, A],
}  # fmt: skip


def write_tokenizer(folder: Path, template: str | None = CHATML) -> Path:
    """Write tokenizer.json (bytes, a few merges, ChatML tokens) and its template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["ĊĊ", "Ġa", "th", "the"]
    vocab = {token: i for i, token in enumerate([*alphabet, *words])}
    merges = [("Ċ", "Ċ"), ("Ġ", "a"), ("t", "h"), ("th", "e")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if template is not None:
        config = {"chat_template": template, "eos_token": "<|im_end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
