#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains model_cards/gpt2-mini-8k-flash: eval/recipes/gpt2-mini-8k-flash.sh [output folder], in as many pieces as you like.
#
#   TEXTS=novels.tar.xz MINUTES=8 eval/recipes/gpt2-mini-8k-flash.sh runs/gpt2-mini    # until it says "finished": true
#
# TEXTS      text files, folders, tar archives. A tenth of the documents, whole ones, is held out and scored.
# LENGTHS    context lengths (default 1024,2048,4096,8192: one model for each, on the same tokens; the checkpoint is the
#            one in <output>/8192).
# STEPS      of 131,072 tokens (default 2500), of which the first SHORT_STEPS (default 1500) are the same for all: rows of
#            the shortest length, from which a new model learns faster.
# PROCESSES  GPUs of this machine (default 1). MINUTES  stop after so many and save the state (default: run to the end).
#
# Size: 8,192 byte pairs x 192 = 1.57 M, 5 layers of 12 x 192^2 + 13 x 192 = 2.22 M: 3.80 M weights, 7.2 MiB in bf16.
# GPT-2's own 50,257 tokens alone would be 18.4 MiB. Positions are rotary: no table, and any length.
set -euo pipefail
cd "$(dirname "$0")/../.."
output=${1:-runs/gpt2-mini-8k-flash}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
: "${TEXTS:?name the texts to train on, for example TEXTS=novels.tar.xz}"

options=()
[ -n "$(find "$output" -name trainer_state.json -print -quit 2>/dev/null)" ] && options+=(--resume_from_checkpoint "$output")
[ -n "${MINUTES:-}" ] && options+=(--max_train_minutes "$MINUTES")

# shellcheck disable=SC2086  # TEXTS is a list
python3 -m accelerate.commands.launch --num_processes "${PROCESSES:-1}" --num_machines 1 --mixed_precision bf16 \
    --dynamo_backend no eval/perplexity.py --do_train --output_dir "$output" --train_file $TEXTS \
    --config_name eval/recipes/gpt2-mini-8k-flash.json --vocab_size 8192 --max_length "${LENGTHS:-1024,2048,4096,8192}" \
    --tokens_per_step 131072 --max_train_steps "${STEPS:-2500}" --short_steps "${SHORT_STEPS:-1500}" \
    --learning_rate 2e-3 --lr_scheduler_type cosine --weight_decay 0.1 --stride 512 --seed 0 \
    --max_batch_tokens "${BATCH_TOKENS:-131072}" --logging_steps 50 --checkpointing_steps 500 "${options[@]}"
