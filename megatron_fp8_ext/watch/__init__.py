"""`megatron-fp8 watch`: a run on one terminal screen, from the files that Megatron or slime writes."""
