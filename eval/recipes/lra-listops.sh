#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains a model of the Long Range Arena's size on ListOps and scores it: eval/recipes/lra-listops.sh [output folder], in
# as many pieces as you like.
#
#   MINUTES=8 eval/recipes/lra-listops.sh runs/lra-listops    # again and again, until it says "finished": true
#
# PROCESSES  GPUs of this machine (default 1). MINUTES  stop after so many and save the state (default: run to the end).
# STEPS      of 64 expressions on each GPU (default 20000: 13 epochs). LEARNING_RATE (default 1e-4; 3e-4 collapses after 1,900 steps). SEED (default 0).
# POSITIONS  rotary (default) or absolute, as in the benchmark. ATTENTION  flash (default), block_sparse, or, with
#            absolute positions, standard, sdpa, linformer, performer. CACHE  folder of the made expressions.
#
# 6 layers of 512, 8 heads, 2,048 in between: 19 M weights. A step is 66,000 tokens, 7.4 TFLOP in matrix products and 3.3
# in attention.
set -euo pipefail
cd "$(dirname "$0")/../.."
output=${1:-runs/lra-listops}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

options=()
[ -d "$output/checkpoint" ] && options+=(--resume_from_checkpoint "$output")
[ -n "${MINUTES:-}" ] && options+=(--max_train_minutes "$MINUTES")

python3 -m accelerate.commands.launch --num_processes "${PROCESSES:-1}" --num_machines 1 --mixed_precision bf16 \
    --dynamo_backend no eval/lra.py --task listops --do_train --output_dir "$output" --seed "${SEED:-0}" \
    --attention "${ATTENTION:-flash}" --position_embedding_type "${POSITIONS:-rotary}" \
    --per_device_train_batch_size 64 --max_train_steps "${STEPS:-20000}" --learning_rate "${LEARNING_RATE:-1e-4}" \
    --num_warmup_steps 1000 --lr_scheduler_type cosine --weight_decay 0.1 --dropout 0.1 \
    --data_cache_dir "${CACHE:-$output/data}" --checkpointing_steps 1000 "${options[@]}"
