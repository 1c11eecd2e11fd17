#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What all recipes of the Pathfinder tasks share: eval/recipes/pathfinder.sh [output folder], in as many pieces as you like.
#
#   PROCESSES=2 MINUTES=8.3 eval/recipes/pathfinder.sh runs/path     # again and again, until "finished": true
#
# CURRICULUM  the stages, as of --curriculum (default: the task's); batch sizes are per GPU. MODEL  the checkpoint to start from (default: none).
# PROCESSES   GPUs of this machine (default 1). MINUTES  stop after so many and save the state (default: run to the end).
# SCRIPT, IMAGE_SIZE, LEARNING_RATE  the task's script and size (default Path-X), the peak rate. SAMPLES  test images at
# the end (default 2000). CURVE_LOSS=0  learns from labels alone, MASKED_PIXELS=0.5  from images alone.
# Another run of the same command goes on where the last one stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
output=${1:-runs/pathfinder}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

options=()
[ -d "$output/checkpoint" ] && options+=(--resume_from_checkpoint "$output")
[ -n "${IMAGE_SIZE:-}" ] && options+=(--image_size "$IMAGE_SIZE")
[ -n "${CURRICULUM:-}" ] && options+=(--curriculum "$CURRICULUM")
[ -n "${MODEL:-}" ] && options+=(--model_name_or_path "$MODEL")
[ -n "${MASKED_PIXELS:-}" ] && options+=(--masked_pixels "$MASKED_PIXELS")
[ -n "${MINUTES:-}" ] && options+=(--max_train_minutes "$MINUTES")

python3 -m accelerate.commands.launch --num_processes "${PROCESSES:-1}" --num_machines 1 --mixed_precision bf16 \
    --dynamo_backend no "${SCRIPT:-eval/pathx.py}" --do_train --torch_compile --output_dir "$output" --seed 0 \
    --learning_rate "${LEARNING_RATE:-7e-4}" --num_warmup_steps 200 --lr_scheduler_type cosine --weight_decay 0.05 \
    --curve_loss_weight "${CURVE_LOSS:-1.0}" --curve_loss_weight_end 0.3 --curve_loss_layers half --ema_decay 0.999 \
    --contrast_jitter 0.2 --checkpointing_steps 500 --num_eval_samples "${SAMPLES:-2000}" "${options[@]}"
