#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The Path-X model from labels alone, without the generator's curve numbers, after masked-pixel pretraining on images of
# the same kind: eval/recipes/pathx-labels.sh [output folder]. PROCESSES, MINUTES and options as in pathfinder.sh;
# PRETRAINING  the curriculum of the first part. With MINUTES, again and again until the second part is finished.
set -euo pipefail
cd "$(dirname "$0")/../.."
output=${1:-runs/pathx-labels}
if [ ! -f "$output/pixels/model.safetensors" ]; then
    MASKED_PIXELS=0.5 CURRICULUM=${PRETRAINING:-48:3:4:800:128,64:5:6:1200:64,96:9:10:1200:32} \
        eval/recipes/pathfinder.sh "$output/pixels"
    [ -z "${MINUTES:-}" ] || exit 0
fi
MODEL=$output/pixels CURVE_LOSS=0 exec eval/recipes/pathfinder.sh "$output/labels"
