"""Supervised fine-tuning data and loss.

conversation  a record of any of the usual schemas -> messages
template      messages -> tokens and loss mask, by the tokenizer's chat template
shards        memory-mapped tokenized samples; `shard_writer` and `pack_job` write them
statistics    what was packed: samples, tokens, fill, lengths
loss          the InfiAlign loss and its named alternative
"""
