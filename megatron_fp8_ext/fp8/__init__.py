"""FP8 numerics in plain PyTorch: the specification, its error statistics, and the emulation."""
