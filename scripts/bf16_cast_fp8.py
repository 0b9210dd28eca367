"""The reference's bf16_cast_fp8.py by its argument names."""

from megatron_fp8_ext.launch.reference_tools import main

main("bf16_to_fp8")
