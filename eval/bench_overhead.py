# SPDX-License-Identifier: Apache-2.0
"""What a patched BERT costs where the kernels have next to nothing to do: batch 1, 128 tokens.

There a GPU waits for the host, so the time of a forward pass is that of Python and of PyTorch's dispatcher. BERT-base
with random weights, patched, against the same model with `sdpa` and with `eager` attention: a forward pass without and
with a mask (of ones, as a tokenizer gives it), a training step (forward and backward, with dropout), and one call of
the attention function alone, without gradients. bfloat16 on CUDA, float32 on a CPU, where the arithmetic of the model
hides the host. Nothing is compiled.

Times are medians over rounds, in each of which every implementation has its turn: `host` until the last kernel is
queued, the other until it is done. Before that, the hidden states of the patched model must be as near to exact ones
(float64) as those of `sdpa`, within a factor of 2.

    python eval/bench_overhead.py
    python eval/bench_overhead.py --quick --device cpu        # a small model: the host's share on a CPU

Writes a CSV file to eval/results/; the last line on stdout is one JSON object.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from bench_attention import conditions, error_ratio, report_rows
from transformers import BertConfig, BertModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward

import flash_models

PEERS = ("sdpa", "eager")


def create_models(config, device):
    """Name: model, all of the same weights, in the dtype of the device."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = BertModel._from_config(config, attn_implementation="eager").to(device, dtype).eval()
    models = {"flash_models": flash_models.patch(copy.deepcopy(source))}
    for name in PEERS:
        models[name] = copy.deepcopy(source)
        models[name].set_attn_implementation(name)
    return models


@torch.no_grad()
def verify(models, inputs):
    """Error of the patched model's hidden states as a multiple of that with sdpa. Exits if above 2."""
    exact = copy.deepcopy(models["eager"]).double()(**inputs).last_hidden_state
    results = {name: model(**inputs).last_hidden_state for name, model in models.items()}
    error = error_ratio(results["flash_models"], exact, results["sdpa"])
    if not error <= 2:
        sys.exit(f"the error of the patched model is {error:.2f} times that with sdpa, more than 2: not timed")
    return error


def forward(model, inputs):
    model(**inputs)


def training_step(model, inputs):
    model(**inputs).last_hidden_state.sum().backward()


def attention_call(model, inputs):
    """A function that calls the attention of a layer of `model` as the layer does."""
    module, config = model.encoder.layer[0].attention.self, model.config
    fn = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)
    shape = (*inputs["input_ids"].shape, config.num_attention_heads, module.attention_head_size)
    q, k, v = (torch.randn(shape, device=model.device, dtype=model.dtype).transpose(1, 2) for _ in range(3))
    return lambda: fn(module, q, k, v, None, dropout=0.0, scaling=module.scaling)


def interleaved(calls, device, rounds, number):
    """{name: (microseconds a call, those until it is queued)}, medians over `rounds` of `number` calls each."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = {name: [] for name in calls}
    for at in range(rounds + 1):  # the first is a warm-up
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            for _ in range(number):
                call()
            queued = time.perf_counter()
            wait()
            if at:
                times[name].append((time.perf_counter() - start, queued - start))
    return {
        name: [statistics.median(t) * 1e6 / number for t in zip(*pairs, strict=True)] for name, pairs in times.items()
    }


def row_of(what, times):
    row = {"call": what}
    for name, (done, queued) in times.items():
        row |= {f"{name}_us": round(done, 2), f"{name}_host_us": round(queued, 2)}
    return row | {f"speedup_over_{name}": round(times[name][0] / times["flash_models"][0], 3) for name in PEERS}


def measure(config, device, length, rounds):
    """The rows of the table."""
    models = create_models(config, device)
    unmasked = {"input_ids": torch.randint(config.vocab_size, (1, length), device=device)}
    masked = {**unmasked, "attention_mask": torch.ones_like(unmasked["input_ids"])}
    error = round(verify(models, masked), 3)

    def timed(what, make, number):
        times = interleaved({name: make(model) for name, model in models.items()}, device, rounds, number)
        return row_of(what, times) | {"error_ratio": error}

    with torch.no_grad():
        yield timed("attention", lambda model: attention_call(model, unmasked), 100)
        yield timed("forward", lambda model: lambda: forward(model, unmasked), 10)
        yield timed("forward, mask of ones", lambda model: lambda: forward(model, masked), 10)
    yield timed("training step", lambda model: lambda: training_step(model.train(), masked), 5)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length", type=int, default=128, help="tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each implementation (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="12 layers of hidden size 64, for the host's share on a CPU"
    )
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    facts = conditions(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    small = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 64, "vocab_size": 1000}
    config = BertConfig(**(small if args.quick else {}))
    shape = {"layers": config.num_hidden_layers, "hidden_size": config.hidden_size, "length": args.length}
    rows = []
    for row in measure(config, device, args.length, args.rounds):
        rows.append(shape | row)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    report_rows("overhead", rows, facts, args.output_dir, args.quick)
    return rows


if __name__ == "__main__":
    main()
