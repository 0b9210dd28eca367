"""Kernels: casts to block-scaled E4M3, alone and fused, rotation, and head and loss without full logits.

In CUDA C++ for Hopper (`hopper.py` and its sources, compiled at run time by `nvrtc.py`), and in Triton for
what that does not take: partial tiles, FP32, other GPUs, and the interpreter of a machine without one.

Every cast agrees bit for bit with `fp8/reference.py`. A fused kernel rounds its intermediate to BF16
before it casts, as TransformerEngine does, and can return that intermediate. The results lie in
memory as TransformerEngine's `Float8BlockwiseQTensor` stores them, so its GEMMs take them as they are.

Importing this package imports no Triton; its modules do (`support.gap` says whether they can run).
"""
