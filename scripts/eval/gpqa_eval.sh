#!/bin/sh
exec megatron-fp8 eval gpqa "$@"
