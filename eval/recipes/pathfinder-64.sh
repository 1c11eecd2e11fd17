#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains the Path-X model on Pathfinder-64: eval/recipes/pathfinder-64.sh [output folder]. PROCESSES and MINUTES as in
# pathx-16k-flash.sh, whose options it takes.
set -euo pipefail
export IMAGE_SIZE=64 CURRICULUM=${CURRICULUM:-48:3:4:800:128,64:5:6:1200:64,64:9:9:1200:64,64:::2400:64} SAMPLES=${SAMPLES:-20000}
exec "$(dirname "$0")/pathx-16k-flash.sh" "${1:-runs/pathfinder-64}"
