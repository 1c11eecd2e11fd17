# SPDX-License-Identifier: Apache-2.0
"""One training step of a patched model on two processes, which test_tools.py launches: `torchrun ... WAY`.

Every process takes its half of a batch; the weights afterwards are those of the model of transformers after the batch.
On two GPUs, accelerate's FSDP2 in bfloat16: as near to them as the model of transformers comes in the same way.
"""

import os
import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from tiny_models import MODELS, token_ids
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from flash_models import patch

EXAMPLES = 4


def sharded_accelerator():
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["BertLayer"]
    )
    return Accelerator(fsdp_plugin=plugin, mixed_precision="bf16")


def step(model, optimizer, ids, backward=torch.Tensor.backward):
    backward(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss)
    optimizer.step()


def step_on_two(way, model, ids):
    """Take the step in DDP or FSDP2 by accelerate, or in torch's FSDP2; returns the trained module."""
    if way != "fsdp2":
        accelerator = Accelerator() if way == "accelerate" else sharded_accelerator()
        loader = DataLoader(ids, batch_size=EXAMPLES // 2)
        model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
        if way == "accelerate":
            assert isinstance(model, DistributedDataParallel)
        else:
            assert all(isinstance(weight, DTensor) for weight in model.parameters())
        for batch in loader:
            step(model, optimizer, batch, accelerator.backward)
        return accelerator.unwrap_model(model)
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), ids.chunk(2)[distributed.get_rank()])
    return model


def whole_weights(model):
    return {
        key: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().cpu().clone()
        for key, weight in model.named_parameters()
    }


def main(way):
    on_gpus = way == "accelerate_fsdp2"
    torch.set_num_threads(1)
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if on_gpus else "gloo")
    torch.manual_seed(0)
    ids, truth = token_ids(batch=EXAMPLES), MODELS["bert"]()
    start = whole_weights(truth)

    def model():
        copy = MODELS["bert"]()
        copy.load_state_dict(truth.state_dict())
        return copy

    ours, stock = patch(model(), fuse=True), model()
    step(truth, torch.optim.SGD(truth.parameters(), lr=0.1), ids)
    trained, exact = whole_weights(step_on_two(way, ours, ids)), whole_weights(truth)
    if on_gpus:
        theirs = whole_weights(step_on_two(way, stock, ids))
        noise = 1e-3 * max((weight - start[key]).norm() for key, weight in exact.items())
        for key, weight in exact.items():
            error, their_error = ((weights[key] - weight).norm() for weights in (trained, theirs))
            assert error <= 2 * their_error + noise, (key, error, their_error, noise)
    else:
        torch.testing.assert_close(trained, exact, atol=1e-6, rtol=1e-5)
    print(f"{way} equal", flush=True)
    distributed.barrier()
    os._exit(0)  # gloo's threads, while the interpreter ends, now and then abort a process that has done its work


if __name__ == "__main__":
    main(sys.argv[1])
