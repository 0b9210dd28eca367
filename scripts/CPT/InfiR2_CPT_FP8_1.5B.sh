#!/usr/bin/env bash
exec megatron-fp8 run qwen2.5-1.5b-cpt --as-script "$@"
