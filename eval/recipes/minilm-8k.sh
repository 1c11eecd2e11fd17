#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Extends sentence-transformers/all-MiniLM-L6-v2 from 512 to 8,192 tokens and fine-tunes it on long documents:
#
#   TRAIN=train.jsonl.xz DEV=dev.jsonl.xz MINUTES=8 eval/recipes/minilm-8k.sh runs/minilm-8k    # until "finished": true
#
# START       the model, folder or Hub id. LENGTH  in tokens (default 8192). The other variables are those of
#             eval/recipes/ecthr-16k-flash.sh. Not a checkpoint of this project: 22.7 M weights, 51 MiB in bf16.
# Attention is block-sparse, a window of 1,024 tokens and 128 that see and are seen by all, [CLS] among them. The position
# table is repeated, not stretched: within a window every token then has the positions that the model was trained with.
set -euo pipefail
cd "$(dirname "$0")/../.."
export START=${START:-sentence-transformers/all-MiniLM-L6-v2} LENGTHS=${LENGTH:-8192}
export BLOCK_SPARSE=${BLOCK_SPARSE-'{"pattern": "local_global", "window": 1024, "global": 128}'}
export LEARNING_RATE=${LEARNING_RATE:-1e-4} EPOCHS=${EPOCHS:-5} EXTEND=tile
exec eval/recipes/ecthr-16k-flash.sh "${1:-runs/minilm-8k}"
