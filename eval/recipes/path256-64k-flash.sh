#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains path256-64k-flash from the Path-X checkpoint: eval/recipes/path256-64k-flash.sh [output folder]. PROCESSES and
# MINUTES as in pathx-16k-flash.sh, whose options it takes.
set -euo pipefail
export SCRIPT=eval/path256.py MODEL=${MODEL:-model_cards/pathx-16k-flash} CURRICULUM=${CURRICULUM:-256:::1500:8} \
    LEARNING_RATE=${LEARNING_RATE:-2e-4}
exec "$(dirname "$0")/pathx-16k-flash.sh" "${1:-runs/path256-64k-flash}"
