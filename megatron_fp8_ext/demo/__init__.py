"""`megatron-fp8 demo`: BF16 and infir2 from the same start, on real text, on any machine."""
