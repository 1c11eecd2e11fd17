#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains model_cards/path256-64k-flash from the Path-X checkpoint: eval/recipes/path256-64k-flash.sh [output folder], in
# as many pieces as you like. PROCESSES, MINUTES and SAMPLES as in pathfinder.sh, whose options it takes; 42 GiB
# of GPU memory. The shipped one started from what the first part of pathx-16k-flash.sh gives (MODEL=<its output>/first).
set -euo pipefail
export SCRIPT=eval/path256.py MODEL=${MODEL:-model_cards/pathx-16k-flash} LEARNING_RATE=${LEARNING_RATE:-3e-4} \
    CURRICULUM=${CURRICULUM:-192:::500:24,256:::2000:16} SAMPLES=${SAMPLES:-4000}
exec "$(dirname "$0")/pathfinder.sh" "${1:-runs/path256-64k-flash}"
