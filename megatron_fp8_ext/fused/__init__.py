"""Blocks of a transformer layer as one autograd function each, over fused kernels and any FP8 GEMM.

`norm_linear` (RMSNorm and a linear layer: norm-QKV), `cast_linear` (a linear layer: the attention's
projection) and `mlp` (RMSNorm, fc1, SwiGLU, fc2). What they compute is what TransformerEngine's block-scaled
modules compute, cast for cast; what they keep for the backward is less, and one block is a handful of
launches and one node of the graph. Which GEMM multiplies is the caller's choice (`gemm.Gemm`).
"""
