"""How much of packing is tokenization: the chat path beside the bare tokenizer, on one core."""

from __future__ import annotations

import os
import time

from megatron_fp8_ext.sft import template
from megatron_fp8_ext.sft.conversation import Conversation

_CONVERSATIONS, _WORDS = 200, 2000


def measure(tokenizer_path: str) -> str:
    """Return one line: tokens a second of the tokenizer alone and of template, tokens and mask."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    chat = template.load(tokenizer_path)
    text = " ".join(f"step {i}: {i} + {i % 97} = {i + i % 97}," for i in range(_WORDS // 6))
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": f"<think>\n{text}\n</think>\nDone."},
    ]
    conversations = [Conversation(messages, [False, True])] * _CONVERSATIONS
    chat.encode(conversations)  # the tokenizer caches words
    rendered = [chat.render(each)[0] for each in conversations]
    start = time.perf_counter()
    encoded = chat.tokenizer.encode_batch(rendered, add_special_tokens=False)
    bare = time.perf_counter() - start
    tokens = sum(len(each.ids) for each in encoded)
    start = time.perf_counter()
    chat.encode(conversations)
    whole = time.perf_counter() - start
    return (
        f"tokenizer alone, one core: {tokens / bare / 1e6:.2f} M tokens/s; with template and mask "
        f"{tokens / whole / 1e6:.2f} M tokens/s"
    )
