#!/usr/bin/env bash
# On one GPU, or several: RANKS=8 examples/recipes/vlm_clip_1b.sh --tensor-model-parallel-size 2 --graph-encoders
# CUDA graphs of tensor-parallel encoders were not tried; --graph-encoders with nothing after it turns them off.
# Further arguments are Megatron's; they come last, so they win. Without TransformerEngine add
# --transformer-impl local --no-rope-fusion (attention is slow then).
set -euo pipefail
# Megatron asks for it under tensor and context parallelism on GPUs up to Hopper's generation.
export CUDA_DEVICE_MAX_CONNECTIONS=1
cd "$(dirname "$0")/../.."

exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "${RANKS:-1}" \
    -m examples.pretrain_mimo --recipe vlm_clip_1b \
    --num-layers 20 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 5632 --swiglu \
    --normalization RMSNorm --disable-bias-linear \
    --seq-length 4096 --max-position-embeddings 4096 --position-embedding-type rope \
    --tokenizer-type NullTokenizer --vocab-size 50304 --untie-embeddings-and-output-weights \
    --attention-dropout 0 --hidden-dropout 0 --no-gradient-accumulation-fusion --no-persist-layer-norm \
    --micro-batch-size 2 --global-batch-size 16 --train-iters 100 --calculate-per-token-loss \
    --compile-encoders images/encoders --graph-encoders images/encoders --use-distributed-optimizer \
    --lr 1e-4 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-fraction 0.05 --weight-decay 0.1 --clip-grad 1.0 \
    --eval-interval 100 --eval-iters 1 --log-interval 10 --num-workers 4 --ckpt-format torch_dist --bf16 "$@"
