# SPDX-License-Identifier: Apache-2.0
"""Finding and loading the compiled library, doing without it, and saying which of the two it is."""

import subprocess
import sys
import textwrap

import torch

import flash_models
from flash_models import _library, ops


def test_schemas_agree():
    """The schema of the compiled library, if there is one, is the one its stand-in would register."""
    for op in (ops.attention_fwd, ops.attention_bwd):
        name = op._schema.name.split("::")[1]
        assert str(op._schema) == f"flash_models::{name}{_library.SCHEMAS[name]}"


def test_info():
    info = flash_models.info()
    assert info["flash_models"] == flash_models.__version__ and info["torch"] == torch.__version__
    assert str(info).count("\n") == len(info) - 1
    assert ("reference" in info["cpu"]) == (_library.no_kernel_reason(torch.device("cpu")) is not None)


def test_without_library(tmp_path):
    """Where the library cannot be loaded, one warning says why and the results are the same."""
    tensors = [torch.randn(2, 70, 2, 16) for _ in range(3)]
    torch.save(tensors, tmp_path / "inputs.pt")
    program = """
        import sys, warnings
        import torch

        load = torch.ops.load_library

        def refuse(path):
            if "_kernels.so" in str(path):
                raise OSError("wrong ELF class")
            load(path)  # another package's

        torch.ops.load_library = refuse
        import flash_models

        tensors = [t.requires_grad_() for t in torch.load(sys.argv[1] + "/inputs.pt")]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                torch.manual_seed(0)
                out = flash_models.attention(*tensors, causal=True, dropout_p=0.2)
        assert len(caught) == 1 and "plain PyTorch reference" in str(caught[0].message), caught
        assert "_kernels.so" in flash_models.info()["library"], flash_models.info()
        grads = torch.autograd.grad(out.square().sum(), tensors)
        torch.save([out.detach(), *grads], sys.argv[1] + "/results.pt")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), tmp_path], check=True)
    tensors = [t.requires_grad_() for t in tensors]
    torch.manual_seed(0)
    out = flash_models.attention(*tensors, causal=True, dropout_p=0.2)
    expected = [out, *torch.autograd.grad(out.square().sum(), tensors)]
    for result, value in zip(torch.load(tmp_path / "results.pt"), expected, strict=True):
        torch.testing.assert_close(result, value)


def test_import_adds_little_to_that_of_transformers():
    """To its BERT and GPT-2, which every user of these models imports: less than 0.3 s."""
    program = """
        import time
        from transformers import AutoModel, BertForMaskedLM, GPT2LMHeadModel
        start = time.perf_counter()
        import flash_models
        print(time.perf_counter() - start)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    for _ in range(3):  # a busy machine is no reason to fail
        added = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        if added < 0.3:
            return
    raise AssertionError(f"import flash_models took {added:.2f} s, expected less than 0.3 s")
