"""FP8 training for Megatron-LM: `--fp8-recipe infir2` on the command you already have.

Importing this package does nothing. `install()` sets the Megatron seam; the other doors
(`python -m megatron_fp8_ext SCRIPT ...`, the torch autoload entry point, `entrypoints/`) call it too.
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__", "install"]


def install() -> None:
    """Make Megatron's parser understand our flags in this process; may be called many times.

    Call it before Megatron parses its arguments. Nothing is imported or patched until Megatron
    itself is imported, and nothing changes in a run that uses none of our flags.
    """
    from megatron_fp8_ext.megatron_plugin.import_hook import install as _install

    _install()
