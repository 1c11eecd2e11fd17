# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels as ops for CPU tensors.

Where there is no GPU this is what stands between an edit of a kernel and a wrong result: the sources are compiled as
C++ with the files exchanged that wrap instructions and the driver (`tests/emulation`), nothing else.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
CUDA_INCLUDE = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
POSSIBLE = (CUDA_INCLUDE / "cuda_bf16.h").exists() and shutil.which("g++") is not None
NEEDS = "needs g++ and the headers of a CUDA toolkit"


def ops(folder, name, capability, sources):
    """torch.ops.`name`, compiled into `folder` from `sources` of kernels/, on a GPU of this compute capability."""
    torch_dir = Path(torch.__file__).parent
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-w", "-x", "c++", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [
        f"-D{op}_cpu={op}_cuda" for op in ("attention_fwd", "attention_bwd", "forward_scratch", "backward_scratch")
    ]
    command += [f"-Dflash_models={name}", f"-DFM_EMULATED_CAPABILITY={capability}", "-DFLASH_MODELS_CUDA=CPU"]
    command += [f"-I{p}" for p in (ROOT / "tests/emulation", ROOT / "kernels", CUDA_INCLUDE, torch_dir / "include")]
    command += ["-include", "threads.h"]  # what nvcc knows by itself

    def compile_one(source):
        target = folder / f"{source.replace('/', '-')}.o"
        subprocess.run([*command, "-c", ROOT / "kernels" / source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / f"{name}.so"
    link = [f"-L{torch_dir / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    subprocess.run(["g++", "-shared", "-o", library, *objects, *link], check=True)
    torch.ops.load_library(library)
    return getattr(torch.ops, name)
