# SPDX-License-Identifier: Apache-2.0
"""Path-256: Path-X on a canvas of 256 x 256 pixels, 65,536 tokens.

Evaluate:
    accelerate launch eval/path256.py --model_name_or_path model_cards/path256-64k-flash
Train, from the Path-X checkpoint, at 192 x 192 pixels first: dashes, gaps and curves have the same length in pixels on
every canvas, and positions are relative, so that a model can move from one to the next:
    accelerate launch --mixed_precision bf16 eval/path256.py --do_train --torch_compile \\
        --model_name_or_path model_cards/pathx-16k-flash --learning_rate 3e-4 --output_dir runs/path256

All else is as in eval/pathx.py. The last line of stdout is one JSON object.
"""

from pathx import main

if __name__ == "__main__":
    main(image_size=256, description=__doc__)
