#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains the Path-X checkpoint on for Pathfinder-64: eval/recipes/pathfinder-64.sh [output folder]. PROCESSES and MINUTES
# as in pathfinder.sh, whose options it takes.
set -euo pipefail
export MODEL=${MODEL:-model_cards/pathx-16k-flash} IMAGE_SIZE=64 CURRICULUM=${CURRICULUM:-64:::2500:64}
export LEARNING_RATE=${LEARNING_RATE:-5e-4} SAMPLES=${SAMPLES:-20000}
exec "$(dirname "$0")/pathfinder.sh" "${1:-runs/pathfinder-64}"
