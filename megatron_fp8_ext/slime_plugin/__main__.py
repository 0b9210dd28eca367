"""`python -m megatron_fp8_ext.slime_plugin train.py FLAGS`: what the Ray job of a preset runs."""

from megatron_fp8_ext.slime_plugin.launch import main

if __name__ == "__main__":
    main()
