export CUDA_DEVICE_MAX_CONNECTIONS=1
export TORCH_NCCL_AVOID_RECORD_STREAMS=1
export NVTE_ALLOW_NONDETERMINISTIC_ALGO=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export NCCL_NVLS_ENABLE=0
export NVTE_FP8_BLOCK_SCALING_FP32_SCALES=0
torchrun \
    --standalone \
    --nproc-per-node 8 -m megatron_fp8_ext.megatron_plugin.pretrain_gpt \
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
    --bf16 \
    --use-precision-aware-optimizer \
    --transformer-impl transformer_engine \
    --attention-backend auto \
    --pipeline-model-parallel-size 1 \
    --context-parallel-size 1 \
    --sequence-parallel \
    --use-distributed-optimizer \
    --overlap-grad-reduce \
    --overlap-param-gather \
    --distributed-timeout-minutes 120 \
    --seq-length 32768 \
    --max-position-embeddings 32768 \
    --micro-batch-size 1 \
    --global-batch-size 128 \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
    --init-method-std 0.008 \
    --seed 1236 \
    --train-iters 40000 \
    --lr 1e-4 \
    --min-lr 1e-5 \
    --lr-decay-style WSD \
    --lr-warmup-iters 5000 \
    --lr-wsd-decay-style cosine \
    --lr-wsd-decay-iters 5000 \
    --weight-decay 0.1 \
    --adam-beta1 0.9 \
    --adam-beta2 0.95 \
    --clip-grad 1.0 \
    --data-path DATA \
    --data-cache-path exp/InfiR2_CPT_FP8_1.5B/cache \
    --tokenizer-type HuggingFaceTokenizer \
    --tokenizer-model MODEL \
    --split 90,5,5 \
    --num-workers 6 \
    --no-create-attention-mask-in-dataloader \
    --save exp/InfiR2_CPT_FP8_1.5B/checkpoints \
    --pretrained-checkpoint STABLE/iter_0035000 \
    --ckpt-format torch_dist \
    --save-interval 1000 \
    --log-interval 1 \
    --eval-interval 100 \
    --eval-iters 10 \
    --log-throughput \
    --log-timers-to-tensorboard \
    --log-params-norm \
    --log-num-zeros-in-grad \
    --tensorboard-dir exp/InfiR2_CPT_FP8_1.5B/tensorboard \
    --tensor-model-parallel-size 2 \
    --fp8-recipe infir2 \
    --load exp/InfiR2_CPT_FP8_1.5B/checkpoints
mkdir -p exp/InfiR2_CPT_FP8_1.5B
cat > exp/InfiR2_CPT_FP8_1.5B/qwen2.5-1.5b-cpt.sbatch <<'SBATCH'
#!/usr/bin/env bash
#SBATCH --job-name=qwen2.5-1.5b-cpt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=1440
#SBATCH --output=exp/InfiR2_CPT_FP8_1.5B/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# qwen2.5-1.5b-cpt: Qwen2.5-1.5B, warmup, stable and decay in one run of 160B tokens
# Safe to requeue: each start continues from the last checkpoint in the run's own folder.
set -euo pipefail
SRUN=(srun --kill-on-bad-exit=1)
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export CUDA_DEVICE_MAX_CONNECTIONS=1
export TORCH_NCCL_AVOID_RECORD_STREAMS=1
export NVTE_ALLOW_NONDETERMINISTIC_ALGO=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export NCCL_NVLS_ENABLE=0
export NVTE_FP8_BLOCK_SCALING_FP32_SCALES=0

# Preflight on every node: stops here, with the mend, where training would fail.
"${SRUN[@]}" env SLIME_PATH=SLIME megatron-fp8 doctor --gpus 8

saved() { cat exp/InfiR2_CPT_FP8_1.5B/checkpoints/latest_checkpointed_iteration.txt 2>/dev/null || echo 0; }
before=$(saved)
LOAD=(--load exp/InfiR2_CPT_FP8_1.5B/checkpoints)
"${SRUN[@]}" torchrun \
    --nnodes 1 \
    --nproc-per-node 8 \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$HEAD:29400" -m megatron_fp8_ext.megatron_plugin.pretrain_gpt \
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
    --bf16 \
    --use-precision-aware-optimizer \
    --transformer-impl transformer_engine \
    --attention-backend auto \
    --pipeline-model-parallel-size 1 \
    --context-parallel-size 1 \
    --sequence-parallel \
    --use-distributed-optimizer \
    --overlap-grad-reduce \
    --overlap-param-gather \
    --distributed-timeout-minutes 120 \
    --seq-length 32768 \
    --max-position-embeddings 32768 \
    --micro-batch-size 1 \
    --global-batch-size 128 \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
    --init-method-std 0.008 \
    --seed 1236 \
    --train-iters 40000 \
    --lr 1e-4 \
    --min-lr 1e-5 \
    --lr-decay-style WSD \
    --lr-warmup-iters 5000 \
    --lr-wsd-decay-style cosine \
    --lr-wsd-decay-iters 5000 \
    --weight-decay 0.1 \
    --adam-beta1 0.9 \
    --adam-beta2 0.95 \
    --clip-grad 1.0 \
    --data-path DATA \
    --data-cache-path exp/InfiR2_CPT_FP8_1.5B/cache \
    --tokenizer-type HuggingFaceTokenizer \
    --tokenizer-model MODEL \
    --split 90,5,5 \
    --num-workers 6 \
    --no-create-attention-mask-in-dataloader \
    --save exp/InfiR2_CPT_FP8_1.5B/checkpoints \
    --pretrained-checkpoint STABLE/iter_0035000 \
    --ckpt-format torch_dist \
    --save-interval 1000 \
    --log-interval 1 \
    --eval-interval 100 \
    --eval-iters 10 \
    --log-throughput \
    --log-timers-to-tensorboard \
    --log-params-norm \
    --log-num-zeros-in-grad \
    --tensorboard-dir exp/InfiR2_CPT_FP8_1.5B/tensorboard \
    --tensor-model-parallel-size 2 \
    --fp8-recipe infir2 \
    --exit-duration-in-mins 1420 \
    "${LOAD[@]}"

# Out of time, not done, and further than before: once more.
after=$(saved)
if [ "$after" -lt 40000 ] && [ "$after" -gt "$before" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
SBATCH
sbatch exp/InfiR2_CPT_FP8_1.5B/qwen2.5-1.5b-cpt.sbatch
