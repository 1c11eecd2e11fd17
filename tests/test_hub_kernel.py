# SPDX-License-Identifier: Apache-2.0
"""The op in the layout of the package `kernels`: complete without this package, and loaded by theirs."""

import importlib.metadata
import json
import subprocess
import sys
import textwrap

import pytest
import torch

from flash_models import _library, attention
from flash_models.cli import main

if _library.library_path is None:
    pytest.skip("there is no compiled library", allow_module_level=True)

BY_HAND = """
    spec = importlib.util.spec_from_file_location("op_alone", build / "__init__.py")
    kernel = sys.modules["op_alone"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
"""
BY_KERNELS = """
    from kernels import get_local_kernel
    kernel = get_local_kernel(build.parents[1], backend="cpu")
"""
USE = """
    import importlib.util, pathlib, sys
    import torch
    build = pathlib.Path(sys.argv[1])
    {load}
    assert "flash_models" not in sys.modules and "transformers" not in sys.modules
    q, k, v = torch.load(sys.argv[2])
    layout = kernel.layouts.local(300, 64, block_size=64)
    torch.save([kernel.attention(q, k, v, causal=True), kernel.attention(q, k, v, layout=layout)], sys.argv[2])
    print(kernel.info()["library"], kernel.__version__)
"""


@pytest.mark.parametrize("load", [BY_HAND, BY_KERNELS], ids=["by hand", "kernels"])
def test_the_kernel_is_the_op(load, tmp_path, capsys):
    installed = {distribution.name for distribution in importlib.metadata.distributions()}  # not our folder kernels/
    if load is BY_KERNELS and "kernels" not in installed:
        pytest.skip("needs the package kernels")
    main(["kernel", str(tmp_path / "kernel")])
    build = capsys.readouterr().out.strip()
    q, k, v = torch.randn(3, 2, 300, 2, 16)
    torch.save([q, k, v], tmp_path / "tensors.pt")
    program = textwrap.dedent(USE).format(load=textwrap.dedent(load))
    command = [sys.executable, "-c", program, build, str(tmp_path / "tensors.pt")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(build)  # its own library, not the installed one
    causal, sparse = torch.load(tmp_path / "tensors.pt")
    assert torch.equal(causal, attention(q, k, v, causal=True))
    assert (sparse - attention(q, k, v)).abs().max() > 0.01


def test_layout_on_the_disk(tmp_path):
    main(["kernel", str(tmp_path / "kernel")])
    (build,) = (tmp_path / "kernel" / "build").iterdir()
    backend = json.loads((build / "metadata.json").read_text())["backend"]["type"]
    assert build.name.startswith(f"torch-stable-abi211-{'cu' if backend == 'cuda' else 'cpu'}")
    assert sum(1 for path in build.iterdir() if path.suffix == ".so") == 1
    with pytest.raises(SystemExit, match="not an empty folder"):
        main(["kernel", str(tmp_path / "kernel")])
