"""`python entrypoints/train_slime.py [train_async.py] <slime's flags> --fp8-recipe infir2-rl`."""

from pathlib import Path

from megatron_fp8_ext.slime_plugin.launch import main

if __name__ == "__main__":
    main(repository=Path(__file__).resolve().parent.parent)
