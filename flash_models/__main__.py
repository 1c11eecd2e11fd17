# SPDX-License-Identifier: Apache-2.0
"""`python -m flash_models` is the command `flash-models`."""

from .cli import main

main()
