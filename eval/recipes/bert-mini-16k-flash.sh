#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains model_cards/bert-mini-16k-flash: eval/recipes/bert-mini-16k-flash.sh [output folder], in as many pieces as you like.
#
#   TEXTS="novels.tar.xz cases.jsonl.xz" MINUTES=8 eval/recipes/bert-mini-16k-flash.sh runs/bert-mini    # again and again
#
# The shipped one: PROCESSES=2 SHORT_BATCH=128 LONG_BATCH=32, the same batches on two GPUs.
#
# TEXTS      text files, folders, tar archives, JSON lines: what it is pretrained on. Whole documents are held out.
# PROCESSES  GPUs of this machine (default 1). MINUTES  stop after so many and save the state (default: run to the end).
# First on pieces of 1,024 tokens, in <output>/short, which is cheap, then on 16,384. Another run of the same command goes
# on where the last one stopped; it is done when <output>/long has a model.safetensors.
#
# Size: 8,192 word pieces x 256 = 2.10 M, 5 layers of 12 x 256^2 + 13 x 256 = 3.95 M, head and norms 0.07 M: 6.12 M weights,
# 11.7 MiB in bf16. BERT's own 30,522 pieces alone would be 14.9 MiB. Positions are rotary: no table, and any length.
set -euo pipefail
cd "$(dirname "$0")/../.."
output=${1:-runs/bert-mini-16k-flash}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
: "${TEXTS:?name the texts to pretrain on, for example TEXTS=\"novels.tar.xz cases.jsonl.xz\"}"

if [ ! -f "$output/short/model.safetensors" ]; then
    stage=$output/short
    options=(--config_name eval/recipes/bert-mini-16k-flash.json --vocab_size 8192 --max_length 1024
        --per_device_train_batch_size "${SHORT_BATCH:-256}" --max_train_steps "${SHORT_STEPS:-3000}" --learning_rate 1e-3)
else
    stage=$output/long
    options=(--model_name_or_path "$output/short" --max_length 16384
        --per_device_train_batch_size "${LONG_BATCH:-64}" --max_train_steps "${LONG_STEPS:-250}" --learning_rate 3e-4)
fi
[ -d "$stage/checkpoint" ] && options+=(--resume_from_checkpoint "$stage")
[ -n "${MINUTES:-}" ] && options+=(--max_train_minutes "$MINUTES")

# shellcheck disable=SC2086  # TEXTS is a list
python3 -m accelerate.commands.launch --num_processes "${PROCESSES:-1}" --num_machines 1 --mixed_precision bf16 \
    --dynamo_backend no eval/pretrain_mlm.py --do_train --output_dir "$stage" --train_file $TEXTS \
    --validation_split_percentage 3 --mlm_probability 0.2 --max_batch_tokens "${BATCH_TOKENS:-262144}" --seed 0 \
    --lr_scheduler_type linear --weight_decay 0.01 --checkpointing_steps 500 "${options[@]}"
