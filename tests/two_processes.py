# SPDX-License-Identifier: Apache-2.0
"""One training step of a patched model on two processes, which test_tools.py launches: `torchrun ... WAY`.

Every process takes its half of a batch; the weights afterwards are those of the model of transformers after the batch.
"""

import os
import sys

import torch
from accelerate import Accelerator
from tiny_models import MODELS, token_ids
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from flash_models import patch

EXAMPLES = 4


def step(model, optimizer, ids, backward=torch.Tensor.backward):
    backward(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss)
    optimizer.step()


def step_on_two(way, model, ids):
    """Take the step in DDP by accelerate or in FSDP2; returns the module whose weights were trained."""
    if way == "accelerate":
        accelerator = Accelerator()
        loader = DataLoader(ids, batch_size=EXAMPLES // 2)
        model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
        assert isinstance(model, DistributedDataParallel)
        for batch in loader:
            step(model, optimizer, batch, accelerator.backward)
        return accelerator.unwrap_model(model)
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), ids.chunk(2)[distributed.get_rank()])
    return model


def main(way):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    ids, truth, model = token_ids(batch=EXAMPLES), MODELS["bert"](), MODELS["bert"]()
    model.load_state_dict(truth.state_dict())
    step(truth, torch.optim.SGD(truth.parameters(), lr=0.1), ids)
    trained = step_on_two(way, patch(model, fuse=True), ids)
    for key, weight in trained.named_parameters():
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        torch.testing.assert_close(whole, truth.get_parameter(key), atol=1e-6, rtol=1e-5)
    print(f"{way} equal", flush=True)
    distributed.barrier()
    os._exit(0)  # gloo's threads, while the interpreter ends, now and then abort a process that has done its work


if __name__ == "__main__":
    main(sys.argv[1])
