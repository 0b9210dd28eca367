"""Checkpoints: read safely, converted exactly, written at once or not at all.

layout        what a Megatron checkpoint contains, from its index alone (no torch)
safe_pickle   the unpicklers: plain data out, nothing executed
torch_dist    Megatron's `torch_dist` format: stream tensors out of one (torch_dist_writer: write one)
safetensors   the safetensors format, tensor by tensor
huggingface   a Hugging Face folder: configuration, shards, everything else
architecture  config.json -> what Megatron must be told
mapping       the table of names between the two
weights       a Megatron checkpoint's weights, from main parameters where it has them (buffers: without names)
state         arguments and schedule of a checkpoint
megatron      Megatron -> Hugging Face and back
fp8           block-scaled E4M3 for serving, and back
gguf          a GGUF file as a Hugging Face folder
compare       two checkpoints, tensor by tensor; their logits on a prompt
complete      which checkpoint of a folder is whole
output        a folder that appears complete or not at all
"""
