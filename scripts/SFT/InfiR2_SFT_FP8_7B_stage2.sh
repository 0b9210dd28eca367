#!/usr/bin/env bash
exec megatron-fp8 run qwen2.5-7b-sft-stage2 --as-script "$@"
