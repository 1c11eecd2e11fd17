#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains model_cards/pathx-16k-flash: eval/recipes/pathx-16k-flash.sh [output folder], in as many pieces as you like.
#
#   PROCESSES=2 MINUTES=8.3 eval/recipes/pathx-16k-flash.sh runs/pathx     # again and again, until it says "finished": true
#
# PROCESSES  GPUs of this machine (default 1). MINUTES  stop after so many and save the state (default: run to the end).
# SCRIPT, IMAGE_SIZE, MODEL, CURRICULUM, LEARNING_RATE  for another task: its script, its size, the checkpoint to start
# from (default: none), ... CURVE_LOSS=0 learns from labels alone, MASKED_PIXELS=0.5 from images alone. SAMPLES  test
# images at the end (default 2000).
# Another run of the same command goes on where the last one stopped. The batch sizes of the curriculum are per GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
output=${1:-runs/pathx-16k-flash}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

options=()
[ -d "$output/checkpoint" ] && options+=(--resume_from_checkpoint "$output")
[ -n "${IMAGE_SIZE:-}" ] && options+=(--image_size "$IMAGE_SIZE")
[ -n "${MODEL:-}" ] && options+=(--model_name_or_path "$MODEL")
[ -n "${MASKED_PIXELS:-}" ] && options+=(--masked_pixels "$MASKED_PIXELS")
[ -n "${MINUTES:-}" ] && options+=(--max_train_minutes "$MINUTES")

python3 -m accelerate.commands.launch --num_processes "${PROCESSES:-1}" --num_machines 1 --mixed_precision bf16 \
    --dynamo_backend no "${SCRIPT:-eval/pathx.py}" --do_train --torch_compile --output_dir "$output" --seed 0 \
    --curriculum "${CURRICULUM:-48:3:4:800:128,64:5:6:1200:64,96:9:10:1200:32,128:::2200:32}" \
    --learning_rate "${LEARNING_RATE:-7e-4}" --num_warmup_steps 200 --lr_scheduler_type cosine --weight_decay 0.05 \
    --curve_loss_weight "${CURVE_LOSS:-1.0}" --curve_loss_weight_end 0.3 --curve_loss_layers half --ema_decay 0.999 \
    --contrast_jitter 0.2 --checkpointing_steps 500 --num_eval_samples "${SAMPLES:-2000}" "${options[@]}"
