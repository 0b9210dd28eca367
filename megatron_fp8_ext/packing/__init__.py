"""Packing samples of different lengths into fixed token budgets. Needs numpy, never torch.

bins       best-fit decreasing over integer lengths
balance    the packs of one global batch, spread over data-parallel ranks and micro-batches
batches    a rank's packs in each step, as arrays with cu_seqlens and positions
order      which samples form each global batch: a seeded order of every epoch
simulate   fill and balance on a length distribution, beside first fit
"""
