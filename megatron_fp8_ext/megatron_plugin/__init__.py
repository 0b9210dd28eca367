"""The Megatron seam: the only folder that imports megatron or transformer_engine.

import_hook   the doors' common end: runs our patches right after Megatron's modules are imported
parser        wraps `add_megatron_arguments`, so that every Megatron parser knows our flags
flags         expand(argv, facts) -> native flags, environment, notes; pure, and the dry run
command       what a command stands on: schedule flags, and the checkpoint it continues from
schedule_flags, branch  `--lr-schedule wsd` and `--wsd-decay-from` -> native flags; pure
branch_folder, branch_load  a branch's folder; its learning rates once the checkpoint is loaded
data_order, index_cache  the order of the training data, recorded and kept; torn indexes
refusals      which flags cannot go with FP8, and why
compat        versions and devices: the only file that knows them
patches       every upstream symbol we touch, with its reason and when to delete it
precision     which precision a layer really computes in: emulated, or checked TransformerEngine
taps          samples the error of the FP8 casts while training
packed_*      packed SFT: flags, checks, data and forward step, attention without a GPU
documents     inter-document masking for pre-training
cpu, cpu_torch  training without a GPU
pretrain_gpt  an entry script for the megatron-core wheel, which ships none
"""
