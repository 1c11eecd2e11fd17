# SPDX-License-Identifier: Apache-2.0
"""The op alone, without transformers, in the layout of the package `kernels`, which loads kernels from the Hub.

from kernels import get_local_kernel
attention = get_local_kernel(folder).attention
"""

import json
import platform
import shutil
from pathlib import Path

import torch

from . import _library

STABLE_ABI = (2, 11)  # TORCH_TARGET_VERSION in kernels/CMakeLists.txt
_MODULES = "ops _library _checks _cache reference layouts patterns _block_layout _layout_ops _schedule _plot".split()
_INIT = '''\
# SPDX-License-Identifier: Apache-2.0
"""Exact, IO-aware attention: `attention`, `BlockLayout`, `layouts` and `info` of flash-models {version}."""

import sys

__version__ = "{version}"

if "flash_models" in sys.modules:  # a process holds the op once
    from flash_models import BlockLayout, attention, info, layouts
else:
    from . import layouts
    from ._library import info
    from .layouts import BlockLayout
    from .ops import attention

__all__ = ["BlockLayout", "attention", "info", "layouts"]
'''


def write_kernel(folder):
    """Write this installation's op into the new folder `folder`; returns the path of the build in it.

    The build serves every torch from 2.11 on of the installed one's kind: for the CPU, or for its version of CUDA. A
    process that loads it and then imports flash_models has the op twice, which torch refuses; the other order works.
    Raises ValueError if there is no compiled library, or something in `folder` already.
    """
    from . import __version__

    if _library.library_path is None:
        raise ValueError("there is no compiled library to write: install a C++ compiler and this package again")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is already there and not an empty folder; choose another")
    cuda = torch.version.cuda is not None and _library.has_kernel("CUDA")
    backend = f"cu{torch.version.cuda.replace('.', '')}" if cuda else "cpu"
    abi = "torch-stable-abi{}{}".format(*STABLE_ABI)
    build = folder / "build" / f"{abi}-{backend}-{platform.machine()}-{platform.system().lower()}"
    build.mkdir(parents=True)
    for name in _MODULES:
        shutil.copyfile(Path(__file__).parent / f"{name}.py", build / f"{name}.py")
    shutil.copyfile(_library.library_path, build / Path(_library.library_path).name)
    (build / "__init__.py").write_text(_INIT.format(version=__version__), "utf-8")
    # without "archs": the library holds PTX too, which later GPUs compile
    # not the name of this package: `kernels` imports the build under its id
    metadata = {"name": "io-aware-attention", "id": "io_aware_attention", "version": 1, "license": "Apache-2.0"}
    metadata |= {"backend": {"type": "cuda" if cuda else "cpu"}, "python-depends": []}
    (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
    return build
