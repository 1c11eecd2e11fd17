#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains the Path-X model on Pathfinder-32: eval/recipes/pathfinder-32.sh [output folder]. PROCESSES and MINUTES as in
# pathx-16k-flash.sh, whose options it takes.
set -euo pipefail
export IMAGE_SIZE=32 CURRICULUM=${CURRICULUM:-32:4:4:1000:256,32:9:10:1500:256,32:::3500:256} SAMPLES=${SAMPLES:-20000}
exec "$(dirname "$0")/pathx-16k-flash.sh" "${1:-runs/pathfinder-32}"
