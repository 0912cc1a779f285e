#!/usr/bin/env bash
# One process, or several: RANKS=4 examples/recipes/any_to_any_small.sh --tensor-model-parallel-size 2 ...
# Further arguments are Megatron's; they come last, so they win. Without TransformerEngine add
# --transformer-impl local --no-rope-fusion; without a GPU it runs on the CPU, in float32: PRECISION="".
set -euo pipefail
# Megatron asks for it under tensor and context parallelism on GPUs up to Hopper's generation.
export CUDA_DEVICE_MAX_CONNECTIONS=1
cd "$(dirname "$0")/../.."

# shellcheck disable=SC2086
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "${RANKS:-1}" \
    -m examples.pretrain_mimo --recipe any_to_any_small \
    --num-layers 4 --hidden-size 256 --num-attention-heads 8 --ffn-hidden-size 1024 \
    --seq-length 128 --max-position-embeddings 128 --position-embedding-type rope \
    --tokenizer-type NullTokenizer --vocab-size 128 --make-vocab-size-divisible-by 64 \
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 \
    --no-gradient-accumulation-fusion --no-persist-layer-norm \
    --micro-batch-size 8 --global-batch-size 32 --train-iters 200 --calculate-per-token-loss \
    --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-fraction 0.05 --weight-decay 0.01 \
    --eval-interval 100 --eval-iters 2 --log-interval 10 --num-workers 2 \
    --ckpt-format torch_dist ${PRECISION---bf16} "$@"
