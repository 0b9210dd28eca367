"""The RL loop's rollout server (tests/slime/rl_loop) for a model of text.

python text_server.py MODEL --port PORT

Only the tokenizer differs: the loop's own knows sums.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rl_loop import arithmetic, server
from transformers import AutoTokenizer

TOKENIZER = AutoTokenizer.from_pretrained(Path(sys.argv[1]))


class TextEngine(server.Engine):
    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        reply = super().answer(body)
        reply["text"] = TOKENIZER.decode(reply["output_ids"], skip_special_tokens=True)
        return reply


if __name__ == "__main__":
    arithmetic.VOCABULARY = TOKENIZER.get_vocab()
    arithmetic.EOS = arithmetic.PAD = TOKENIZER.eos_token
    server.Engine = TextEngine
    server.main()
