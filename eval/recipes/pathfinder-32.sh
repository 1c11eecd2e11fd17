#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains the Path-X checkpoint on for Pathfinder-32: eval/recipes/pathfinder-32.sh [output folder]. PROCESSES and MINUTES
# as in pathfinder.sh, whose options it takes.
set -euo pipefail
export MODEL=${MODEL:-model_cards/pathx-16k-flash} IMAGE_SIZE=32 CURRICULUM=${CURRICULUM:-32:::3000:256}
export LEARNING_RATE=${LEARNING_RATE:-5e-4} SAMPLES=${SAMPLES:-20000}
exec "$(dirname "$0")/pathfinder.sh" "${1:-runs/pathfinder-32}"
