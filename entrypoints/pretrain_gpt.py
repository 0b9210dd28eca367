"""`torchrun ... entrypoints/pretrain_gpt.py <Megatron flags> --fp8-recipe infir2`."""

from megatron_fp8_ext.megatron_plugin.pretrain_gpt import main

if __name__ == "__main__":
    main()
