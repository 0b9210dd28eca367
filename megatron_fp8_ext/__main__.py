"""`python -m megatron_fp8_ext SCRIPT ARGS...`: set the seam, then run SCRIPT as `__main__`.

Under torchrun: `torchrun --nproc-per-node 8 -m megatron_fp8_ext pretrain_gpt.py ...`.
"""

from __future__ import annotations

import os
import runpy
import sys


def main() -> None:
    """Run the script named on the command line."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(
            "usage: python -m megatron_fp8_ext SCRIPT ARGS...\n"
            "SCRIPT is Megatron's pretrain_gpt.py or any other; `megatron-fp8 --help` for the rest",
            file=sys.stderr,
        )
        raise SystemExit(2)
    script = sys.argv[1]
    if not os.path.isfile(script):
        print(f"megatron_fp8_ext: error: no script at {script}", file=sys.stderr)
        raise SystemExit(2)
    import megatron_fp8_ext

    megatron_fp8_ext.install()
    sys.argv = sys.argv[1:]
    # As `python SCRIPT` would: pretrain_gpt.py imports gpt_builders from its own folder.
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
