"""Triton kernels: casts to block-scaled E4M3, alone and fused, and the softmax of a chunked loss.

Every cast agrees bit for bit with `fp8/reference.py`. A fused kernel rounds its intermediate to BF16
before it casts, as TransformerEngine does, and can return that intermediate. The results lie in
memory as TransformerEngine's `Float8BlockwiseQTensor` stores them, so its GEMMs take them as they are.

Importing this package imports no Triton; its modules do (`support.gap` says whether they can run).
"""
