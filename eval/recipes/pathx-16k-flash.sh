#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains model_cards/pathx-16k-flash: eval/recipes/pathx-16k-flash.sh [output folder]. PROCESSES, MINUTES and SAMPLES as in
# pathfinder.sh. First, in <output>/first, over growing canvases; then longer on whole images. With MINUTES, again and again
# until the second part is finished.
set -euo pipefail
cd "$(dirname "$0")/../.."
output=${1:-runs/pathx-16k-flash}
if [ ! -f "$output/first/model.safetensors" ]; then
    SAMPLES=0 CURRICULUM=48:3:4:800:128,64:5:6:1200:64,96:9:10:1200:32,128:::2200:32 LEARNING_RATE=7e-4 \
        eval/recipes/pathfinder.sh "$output/first"
    [ -z "${MINUTES:-}" ] || exit 0
fi
MODEL=$output/first CURRICULUM=128:::3900:32 LEARNING_RATE=4e-4 SAMPLES=${SAMPLES:-20000} \
    exec eval/recipes/pathfinder.sh "$output"
