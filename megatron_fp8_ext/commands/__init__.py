"""Groups of `megatron-fp8` commands, one file each; heavy imports stay inside the functions."""
