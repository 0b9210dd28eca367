# preflight of every node of the cluster that has GPUs: stops here, naming node and mend
ray job submit \
    --address http://HEAD:8265 \
    --runtime-env-json '{"env_vars": {"SLIME_PATH": "SLIME", "PYTHONPATH": "SLIME:${PYTHONPATH}"}}' \
    -- python3 -m megatron_fp8_ext.cli doctor \
    --every-node \
    --cluster-gpus 16 \
    --gpus 8 \
    --slime \
    --engine-gpus 0 &&
ray job submit \
    --address http://HEAD:8265 \
    --runtime-env-json '{"env_vars": {"TENSORBOARD_DIR": "exp/InfiR2_SFT_FP8_1.5B_stage2/tensorboard", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCH_NCCL_AVOID_RECORD_STREAMS": "1", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1", "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "0", "SLIME_PATH": "SLIME", "PYTHONPATH": "SLIME:${PYTHONPATH}"}}' \
    -- python3 -m megatron_fp8_ext.slime_plugin train_async.py \
    --num-layers 28 \
    --hidden-size 1536 \
    --ffn-hidden-size 8960 \
    --num-attention-heads 12 \
    --group-query-attention \
    --num-query-groups 2 \
    --disable-bias-linear \
    --add-qkv-bias \
    --normalization RMSNorm \
    --norm-epsilon 1e-06 \
    --swiglu \
    --position-embedding-type rope \
    --rotary-percent 1.0 \
    --rotary-base 1000000 \
    --padded-vocab-size 151936 \
    --vocab-size 151936 \
    --bf16 \
    --transformer-impl transformer_engine \
    --attention-backend flash \
    --attention-softmax-in-fp32 \
    --accumulate-allreduce-grads-in-fp32 \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
    --pipeline-model-parallel-size 1 \
    --context-parallel-size 1 \
    --sequence-parallel \
    --recompute-granularity full \
    --recompute-method uniform \
    --recompute-num-layers 1 \
    --global-batch-size 64 \
    --optimizer adam \
    --lr-decay-style cosine \
    --lr-warmup-fraction 0.05 \
    --weight-decay 0 \
    --adam-beta1 0.9 \
    --adam-beta2 0.95 \
    --save exp/InfiR2_SFT_FP8_1.5B_stage2/checkpoints \
    --save-interval 1000 \
    --tensorboard-dir exp/InfiR2_SFT_FP8_1.5B_stage2/tensorboard \
    --tensor-model-parallel-size 2 \
    --lr 5e-5 \
    --min-lr 5e-6 \
    --use-tensorboard \
    --actor-num-nodes 2 \
    --actor-num-gpus-per-node 8 \
    --num-gpus-per-node 8 \
    --expert-model-parallel-size 1 \
    --expert-tensor-parallel-size 1 \
    --hf-checkpoint MODEL \
    --ref-load STABLE/iter_0035000 \
    --rollout-function-path slime.rollout.sft_rollout.generate_rollout \
    --prompt-data DATA \
    --input-key messages \
    --rollout-shuffle \
    --num-epoch 5 \
    --rollout-batch-size 64 \
    --loss-type sft_loss \
    --calculate-per-token-loss \
    --disable-compute-advantages-and-returns \
    --debug-train-only \
    --use-dynamic-batch-size \
    --max-tokens-per-gpu 32768 \
    --fp8-recipe infir2 \
    --load exp/InfiR2_SFT_FP8_1.5B_stage2/checkpoints
mkdir -p exp/InfiR2_SFT_FP8_1.5B_stage2
cat > exp/InfiR2_SFT_FP8_1.5B_stage2/qwen2.5-1.5b-sft-stage2.sbatch <<'SBATCH'
#!/usr/bin/env bash
#SBATCH --job-name=qwen2.5-1.5b-sft-stage2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=1440
#SBATCH --output=exp/InfiR2_SFT_FP8_1.5B_stage2/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@1200
# qwen2.5-1.5b-sft-stage2: Qwen2.5-1.5B, SFT stage 2 on InfiAlign-SFT-165k, five epochs
# Safe to requeue: each start continues from the last checkpoint in the run's own folder.
set -euo pipefail
SRUN=(srun --kill-on-bad-exit=1)
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TENSORBOARD_DIR=exp/InfiR2_SFT_FP8_1.5B_stage2/tensorboard
export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_NCCL_AVOID_RECORD_STREAMS=1
export NVTE_ALLOW_NONDETERMINISTIC_ALGO=1
export NVTE_FP8_BLOCK_SCALING_FP32_SCALES=0

# Preflight on every node: stops here, with the mend, where training would fail.
"${SRUN[@]}" env SLIME_PATH=SLIME megatron-fp8 doctor --gpus 8 --slime --engine-gpus 0

saved() { cat exp/InfiR2_SFT_FP8_1.5B_stage2/checkpoints/latest_checkpointed_iteration.txt 2>/dev/null || echo 0; }
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
[ "$SLURM_JOB_NUM_NODES" -eq 1 ] || srun --overlap --nodes=1 --ntasks=1 -x "$HEAD" ray start --block --address="$HEAD_IP:6379" --num-gpus=8 --disable-usage-stats &
sleep 20
# Ray fills ${PYTHONPATH} in, on each node.
# shellcheck disable=SC2016
srun --nodes=1 --ntasks=1 --overlap -w "$HEAD" ray job submit \
    --address http://127.0.0.1:8265 \
    --runtime-env-json '{"env_vars": {"TENSORBOARD_DIR": "exp/InfiR2_SFT_FP8_1.5B_stage2/tensorboard", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCH_NCCL_AVOID_RECORD_STREAMS": "1", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1", "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "0", "SLIME_PATH": "SLIME", "PYTHONPATH": "SLIME:${PYTHONPATH}"}}' \
    -- python3 -m megatron_fp8_ext.slime_plugin train_async.py \
    --num-layers 28 \
    --hidden-size 1536 \
    --ffn-hidden-size 8960 \
    --num-attention-heads 12 \
    --group-query-attention \
    --num-query-groups 2 \
    --disable-bias-linear \
    --add-qkv-bias \
    --normalization RMSNorm \
    --norm-epsilon 1e-06 \
    --swiglu \
    --position-embedding-type rope \
    --rotary-percent 1.0 \
    --rotary-base 1000000 \
    --padded-vocab-size 151936 \
    --vocab-size 151936 \
    --bf16 \
    --transformer-impl transformer_engine \
    --attention-backend flash \
    --attention-softmax-in-fp32 \
    --accumulate-allreduce-grads-in-fp32 \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
    --pipeline-model-parallel-size 1 \
    --context-parallel-size 1 \
    --sequence-parallel \
    --recompute-granularity full \
    --recompute-method uniform \
    --recompute-num-layers 1 \
    --global-batch-size 64 \
    --optimizer adam \
    --lr-decay-style cosine \
    --lr-warmup-fraction 0.05 \
    --weight-decay 0 \
    --adam-beta1 0.9 \
    --adam-beta2 0.95 \
    --save exp/InfiR2_SFT_FP8_1.5B_stage2/checkpoints \
    --save-interval 1000 \
    --tensorboard-dir exp/InfiR2_SFT_FP8_1.5B_stage2/tensorboard \
    --tensor-model-parallel-size 2 \
    --lr 5e-5 \
    --min-lr 5e-6 \
    --use-tensorboard \
    --actor-num-nodes 2 \
    --actor-num-gpus-per-node 8 \
    --num-gpus-per-node 8 \
    --expert-model-parallel-size 1 \
    --expert-tensor-parallel-size 1 \
    --hf-checkpoint MODEL \
    --ref-load STABLE/iter_0035000 \
    --rollout-function-path slime.rollout.sft_rollout.generate_rollout \
    --prompt-data DATA \
    --input-key messages \
    --rollout-shuffle \
    --num-epoch 5 \
    --rollout-batch-size 64 \
    --loss-type sft_loss \
    --calculate-per-token-loss \
    --disable-compute-advantages-and-returns \
    --debug-train-only \
    --use-dynamic-batch-size \
    --max-tokens-per-gpu 32768 \
    --fp8-recipe infir2 \
    --load exp/InfiR2_SFT_FP8_1.5B_stage2/checkpoints &
job=$!
wait "$job" || { code=$?; [ "$code" -gt 128 ] && wait "$job"; }
SBATCH
sbatch exp/InfiR2_SFT_FP8_1.5B_stage2/qwen2.5-1.5b-sft-stage2.sbatch
