"""The reference's convert_torch_dist_to_hf.py by its argument names."""

from megatron_fp8_ext.launch.reference_tools import main

main("torch_dist_to_hf")
