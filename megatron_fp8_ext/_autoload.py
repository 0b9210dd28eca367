"""What torch calls at the end of `import torch`: the door that needs no change of command.

It must never raise (that would break `import torch` for the whole environment), never import torch,
Megatron or TransformerEngine, and cost nothing in a process that uses none of our flags.
"""

from __future__ import annotations

import os
import sys


def autoload() -> None:
    """Set the seam if one of our flags stands on the command line or in the environment."""
    try:
        if os.environ.get("MEGATRON_FP8_EXT") == "0":
            return
        if not _asked(sys.argv):
            return
        from megatron_fp8_ext.megatron_plugin.import_hook import install

        install()
    except Exception as error:  # never break `import torch`
        print(f"megatron_fp8_ext: not loaded: {error!r}", file=sys.stderr)


def _asked(argv: list[str]) -> bool:
    if os.environ.get("MEGATRON_FP8_EXT_RECIPE"):
        return True
    ours = (
        "--fp8-recipe", "--fp8-emulate", "--fp8-stats-", "--linear-cross-entropy",
        "--lr-schedule", "--wsd-",
    )  # fmt: skip
    return any(token.startswith(ours) for token in argv)
