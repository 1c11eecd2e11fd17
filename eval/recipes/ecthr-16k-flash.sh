#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains model_cards/ecthr-16k-flash: eval/recipes/ecthr-16k-flash.sh [output folder], in as many pieces as you like.
#
#   TRAIN=train.jsonl.xz DEV=dev.jsonl.xz MINUTES=8 eval/recipes/ecthr-16k-flash.sh runs/ecthr    # until "finished": true
#
# TRAIN, DEV  cases of the European Court of Human Rights, JSON lines with `facts` (paragraphs) and `violated` (articles).
# START       the model that is fine-tuned (default model_cards/bert-mini-16k-flash).
# LENGTHS     512,1024,2048,4096,8192,16384 measures what the length is worth (default: 16384 alone, the checkpoint).
# SEEDS       0,1,2 for three (default 0). BLOCK_SPARSE  a pattern, as of --block_sparse (default: dense).
# EPOCHS      (default 20). LEARNING_RATE  (default 5e-4).
# PROCESSES   GPUs of this machine (default 1). MINUTES  stop after so many and save the state (default: run to the end).
#
# Every length gets the same documents and steps. Size: bert-mini-16k-flash without its MLM head, with a pooler and 21
# labels: 6.12 M weights, 11.7 MiB in bf16.
set -euo pipefail
cd "$(dirname "$0")/../.."
output=${1:-runs/ecthr-16k-flash}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
: "${TRAIN:?name the training cases, such as TRAIN=train.jsonl.xz}" "${DEV:?name the cases to evaluate on, such as DEV=dev.jsonl.xz}"

options=()
[ -n "$(find "$output" -name trainer_state.json -print -quit 2>/dev/null)" ] && options+=(--resume_from_checkpoint "$output")
[ -n "${MINUTES:-}" ] && options+=(--max_train_minutes "$MINUTES")
[ -n "${BLOCK_SPARSE:-}" ] && options+=(--block_sparse "$BLOCK_SPARSE")

python3 -m accelerate.commands.launch --num_processes "${PROCESSES:-1}" --num_machines 1 --mixed_precision bf16 \
    --dynamo_backend no eval/long_document.py --do_train --output_dir "$output" \
    --model_name_or_path "${START:-model_cards/bert-mini-16k-flash}" --train_file "$TRAIN" --validation_file "$DEV" \
    --max_length "${LENGTHS:-16384}" --seed "${SEEDS:-0}" --unpad --max_batch_tokens "${BATCH_TOKENS:-131072}" \
    --per_device_train_batch_size 16 --num_train_epochs "${EPOCHS:-20}" --learning_rate "${LEARNING_RATE:-5e-4}" \
    --extend_method "${EXTEND:-interpolate}" --dropout 0.1 --threshold_split 0.1 --logging_steps 100 --checkpointing_steps 1000 "${options[@]}"
