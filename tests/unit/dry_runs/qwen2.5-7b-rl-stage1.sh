# preflight of every node of the cluster that has GPUs: stops here, naming node and mend
ray job submit \
    --address http://HEAD:8265 \
    --runtime-env-json '{"env_vars": {"SLIME_PATH": "SLIME", "PYTHONPATH": "SLIME:${PYTHONPATH}"}}' \
    -- python3 -m megatron_fp8_ext.cli doctor \
    --every-node \
    --cluster-gpus 32 \
    --gpus 8 \
    --slime \
    --engine-gpus 4 \
    --hf-checkpoint MODEL \
    --tensor-parallel 4 &&
ray job submit \
    --address http://HEAD:8265 \
    --runtime-env-json '{"env_vars": {"TENSORBOARD_DIR": "exp/InfiR2_RL_FP8_7B_stage1/tensorboard", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:2048", "TORCH_NCCL_AVOID_RECORD_STREAMS": "1", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1", "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1", "SLIME_PATH": "SLIME", "PYTHONPATH": "SLIME:${PYTHONPATH}"}}' \
    -- python3 -m megatron_fp8_ext.slime_plugin train.py \
    --num-layers 28 \
    --hidden-size 3584 \
    --ffn-hidden-size 18944 \
    --num-attention-heads 28 \
    --group-query-attention \
    --num-query-groups 4 \
    --disable-bias-linear \
    --add-qkv-bias \
    --normalization RMSNorm \
    --norm-epsilon 1e-06 \
    --swiglu \
    --position-embedding-type rope \
    --rotary-percent 1.0 \
    --rotary-base 1000000 \
    --untie-embeddings-and-output-weights \
    --padded-vocab-size 152064 \
    --vocab-size 152064 \
    --bf16 \
    --transformer-impl transformer_engine \
    --attention-backend flash \
    --attention-softmax-in-fp32 \
    --accumulate-allreduce-grads-in-fp32 \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
    --tensor-model-parallel-size 4 \
    --pipeline-model-parallel-size 1 \
    --context-parallel-size 2 \
    --sequence-parallel \
    --recompute-granularity full \
    --recompute-method uniform \
    --recompute-num-layers 1 \
    --global-batch-size 2048 \
    --optimizer adam \
    --lr 1e-6 \
    --lr-decay-style constant \
    --weight-decay 0.1 \
    --adam-beta1 0.9 \
    --adam-beta2 0.98 \
    --save exp/InfiR2_RL_FP8_7B_stage1/checkpoints \
    --save-interval 20 \
    --tensorboard-dir exp/InfiR2_RL_FP8_7B_stage1/tensorboard \
    --use-tensorboard \
    --actor-num-nodes 4 \
    --actor-num-gpus-per-node 8 \
    --num-gpus-per-node 8 \
    --colocate \
    --expert-model-parallel-size 1 \
    --expert-tensor-parallel-size 1 \
    --hf-checkpoint MODEL \
    --ref-load STABLE/iter_0035000 \
    --prompt-data DATA \
    --input-key prompt \
    --label-key label \
    --apply-chat-template \
    --rollout-shuffle \
    --rm-type deepscaler \
    --num-rollout 10240 \
    --rollout-batch-size 128 \
    --n-samples-per-prompt 16 \
    --over-sampling-batch-size 384 \
    --dynamic-sampling-filter-path slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std \
    --balance-data \
    --use-dynamic-batch-size \
    --advantage-estimator grpo \
    --use-kl-loss \
    --kl-loss-coef 0.00 \
    --kl-loss-type low_var_kl \
    --entropy-coef 0.00 \
    --eps-clip 0.2 \
    --eps-clip-high 0.28 \
    --use-tis \
    --rollout-num-gpus-per-engine 4 \
    --sglang-mem-fraction-static 0.5 \
    --sglang-max-running-requests 128 \
    --eval-interval 20 \
    --eval-prompt-data aime EVAL \
    --n-samples-per-eval-prompt 16 \
    --eval-max-response-len 30000 \
    --eval-top-p 0.7 \
    --max-tokens-per-gpu 8192 \
    --rollout-max-response-len 8192 \
    --rollout-temperature 1.0 \
    --fp8-recipe infir2-rl \
    --load exp/InfiR2_RL_FP8_7B_stage1/checkpoints
mkdir -p exp/InfiR2_RL_FP8_7B_stage1
cat > exp/InfiR2_RL_FP8_7B_stage1/qwen2.5-7b-rl-stage1.sbatch <<'SBATCH'
#!/usr/bin/env bash
#SBATCH --job-name=qwen2.5-7b-rl-stage1
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=1440
#SBATCH --output=exp/InfiR2_RL_FP8_7B_stage1/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@1200
# qwen2.5-7b-rl-stage1: Qwen2.5-7B, RL stage 1, answers of up to 8k tokens
# Safe to requeue: each start continues from the last checkpoint in the run's own folder.
set -euo pipefail
SRUN=(srun --kill-on-bad-exit=1)
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TENSORBOARD_DIR=exp/InfiR2_RL_FP8_7B_stage1/tensorboard
export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:2048
export TORCH_NCCL_AVOID_RECORD_STREAMS=1
export NVTE_ALLOW_NONDETERMINISTIC_ALGO=1
export NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1

# Preflight on every node: stops here, with the mend, where training would fail.
"${SRUN[@]}" env SLIME_PATH=SLIME megatron-fp8 doctor --gpus 8 --slime --engine-gpus 4 --hf-checkpoint MODEL --tensor-parallel 4

saved() { cat exp/InfiR2_RL_FP8_7B_stage1/checkpoints/latest_checkpointed_iteration.txt 2>/dev/null || echo 0; }
before=$(saved)
# Slurm's signal, 20 minutes before the end: once more, if further than before.
again() {
    if [ "$(saved)" -gt "$before" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
}
trap again USR1

# One Ray cluster inside this job. Its nodes talk over the cluster's network; the dashboard, whose
# job API runs any code it is sent, listens on the head's loopback only.
HEAD_IP=$(srun --nodes=1 --ntasks=1 -w "$HEAD" hostname -i | cut -d" " -f1)
srun --nodes=1 --ntasks=1 --overlap -w "$HEAD" ray start --head --block --port=6379 --node-ip-address="$HEAD_IP" --dashboard-host=127.0.0.1 --dashboard-port=8265 --num-gpus=8 --disable-usage-stats &
sleep 20
[ "$SLURM_JOB_NUM_NODES" -eq 1 ] || srun --overlap --nodes=3 --ntasks=3 -x "$HEAD" ray start --block --address="$HEAD_IP:6379" --num-gpus=8 --disable-usage-stats &
sleep 20
# Ray fills ${PYTHONPATH} in, on each node.
# shellcheck disable=SC2016
srun --nodes=1 --ntasks=1 --overlap -w "$HEAD" ray job submit \
    --address http://127.0.0.1:8265 \
    --runtime-env-json '{"env_vars": {"TENSORBOARD_DIR": "exp/InfiR2_RL_FP8_7B_stage1/tensorboard", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:2048", "TORCH_NCCL_AVOID_RECORD_STREAMS": "1", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1", "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1", "SLIME_PATH": "SLIME", "PYTHONPATH": "SLIME:${PYTHONPATH}"}}' \
    -- python3 -m megatron_fp8_ext.slime_plugin train.py \
    --num-layers 28 \
    --hidden-size 3584 \
    --ffn-hidden-size 18944 \
    --num-attention-heads 28 \
    --group-query-attention \
    --num-query-groups 4 \
    --disable-bias-linear \
    --add-qkv-bias \
    --normalization RMSNorm \
    --norm-epsilon 1e-06 \
    --swiglu \
    --position-embedding-type rope \
    --rotary-percent 1.0 \
    --rotary-base 1000000 \
    --untie-embeddings-and-output-weights \
    --padded-vocab-size 152064 \
    --vocab-size 152064 \
    --bf16 \
    --transformer-impl transformer_engine \
    --attention-backend flash \
    --attention-softmax-in-fp32 \
    --accumulate-allreduce-grads-in-fp32 \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
    --tensor-model-parallel-size 4 \
    --pipeline-model-parallel-size 1 \
    --context-parallel-size 2 \
    --sequence-parallel \
    --recompute-granularity full \
    --recompute-method uniform \
    --recompute-num-layers 1 \
    --global-batch-size 2048 \
    --optimizer adam \
    --lr 1e-6 \
    --lr-decay-style constant \
    --weight-decay 0.1 \
    --adam-beta1 0.9 \
    --adam-beta2 0.98 \
    --save exp/InfiR2_RL_FP8_7B_stage1/checkpoints \
    --save-interval 20 \
    --tensorboard-dir exp/InfiR2_RL_FP8_7B_stage1/tensorboard \
    --use-tensorboard \
    --actor-num-nodes 4 \
    --actor-num-gpus-per-node 8 \
    --num-gpus-per-node 8 \
    --colocate \
    --expert-model-parallel-size 1 \
    --expert-tensor-parallel-size 1 \
    --hf-checkpoint MODEL \
    --ref-load STABLE/iter_0035000 \
    --prompt-data DATA \
    --input-key prompt \
    --label-key label \
    --apply-chat-template \
    --rollout-shuffle \
    --rm-type deepscaler \
    --num-rollout 10240 \
    --rollout-batch-size 128 \
    --n-samples-per-prompt 16 \
    --over-sampling-batch-size 384 \
    --dynamic-sampling-filter-path slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std \
    --balance-data \
    --use-dynamic-batch-size \
    --advantage-estimator grpo \
    --use-kl-loss \
    --kl-loss-coef 0.00 \
    --kl-loss-type low_var_kl \
    --entropy-coef 0.00 \
    --eps-clip 0.2 \
    --eps-clip-high 0.28 \
    --use-tis \
    --rollout-num-gpus-per-engine 4 \
    --sglang-mem-fraction-static 0.5 \
    --sglang-max-running-requests 128 \
    --eval-interval 20 \
    --eval-prompt-data aime EVAL \
    --n-samples-per-eval-prompt 16 \
    --eval-max-response-len 30000 \
    --eval-top-p 0.7 \
    --max-tokens-per-gpu 8192 \
    --rollout-max-response-len 8192 \
    --rollout-temperature 1.0 \
    --fp8-recipe infir2-rl \
    --load exp/InfiR2_RL_FP8_7B_stage1/checkpoints &
job=$!
wait "$job" || { code=$?; [ "$code" -gt 128 ] && wait "$job"; }
SBATCH
sbatch exp/InfiR2_RL_FP8_7B_stage1/qwen2.5-7b-rl-stage1.sbatch
