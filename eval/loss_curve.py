# SPDX-License-Identifier: Apache-2.0
"""Do fused training steps learn the same? Two trainings from one set of weights, on the same batches of real text.

One is transformers with eager attention, the other `flash_models.patch(model, fuse=True)`; bfloat16 autocast on CUDA,
float32 on a CPU. Dropout masks cannot be the same, so at a dropout above 0 the curves differ as two seeds do; give
--seeds 2 to see by how much, or --dropout 0 to see rounding alone. Reports the largest difference of the smoothed
losses, after the first --window steps, between the two, and between two seeds of transformers.

    python eval/loss_curve.py --train_file books.txt --model gpt2
    python eval/loss_curve.py --train_file books/ --model bert --dropout 0 --steps 300

Writes loss-curve-<model>.csv and .png to --output_dir; the last line on stdout is one JSON object.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from bench_attention import conditions, write_csv
from figures import draw_loss_curves
from tasks.script import explain_mistakes, writable_folder
from tasks.text_files import read_texts, tell_problems
from tasks.text_tokenizer import train_byte_pairs, train_word_pieces
from tasks.token_batches import step_indices, to_device
from tasks.training_loop import bar_interval
from tqdm.auto import tqdm
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    get_cosine_schedule_with_warmup,
)

from flash_models import patch


def build(args, tokenizer, device):
    """transformers' model with eager attention; the same weights every time."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "attn_implementation": "eager", "use_cache": False}
    if args.model == "bert":
        rates = {"hidden_dropout_prob": args.dropout, "attention_probs_dropout_prob": args.dropout}
        model = BertForMaskedLM(
            BertConfig(
                hidden_size=args.hidden_size,
                num_hidden_layers=args.layers,
                intermediate_size=4 * args.hidden_size,
                num_attention_heads=args.hidden_size // 64,
                max_position_embeddings=args.length,
                **rates,
                **sizes,
            )  # fmt: skip
        )
    else:
        rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), args.dropout)
        ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
        model = GPT2LMHeadModel(
            GPT2Config(
                n_embd=args.hidden_size,
                n_layer=args.layers,
                n_head=args.hidden_size // 64,
                n_positions=args.length,
                **rates,
                **sizes,
                **ends,
            )  # fmt: skip
        )
        model.loss_type = "ForCausalLM"
    return model.to(device).train()


class Batches:
    """Batch number `step` of the texts, the same in every training: input_ids and labels, int64 (batch, length)."""

    def __init__(self, args, tokenizer, texts):
        tokens = []
        for text in tqdm(texts, desc="tokenize", mininterval=bar_interval()):
            tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            tokens.append(tokenizer.sep_token_id if args.model == "bert" else tokenizer.eos_token_id)
        count = len(tokens) // args.length
        if count < args.batch_size:
            raise ValueError(
                f"the text has {len(tokens):,} tokens, {count} rows of {args.length}; one batch needs "
                f"{args.batch_size}: give more text, or a shorter --length or --batch_size"
            )
        self.rows = torch.tensor(tokens[: count * args.length]).view(count, args.length)
        self.size = args.batch_size
        self.mask = DataCollatorForLanguageModeling(tokenizer, mlm=True) if args.model == "bert" else None

    def __call__(self, step):
        ids = self.rows[step_indices(len(self.rows), step, self.size, seed=0)]
        if self.mask is None:
            return {"input_ids": ids, "labels": ids}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step)
            ids, labels = self.mask.torch_mask_tokens(ids.clone())
        return {"input_ids": ids, "labels": labels}


def train(name, fused, seed, args, tokenizer, batches, device):
    """The loss of every step, and seconds a step."""
    model = build(args, tokenizer, device)
    if fused:
        patch(model, fuse=True)
    torch.manual_seed(seed)  # of the dropout masks
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    losses, begun = [], time.perf_counter()
    for step in tqdm(range(args.steps), desc=name, mininterval=bar_interval()):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**to_device(batches(step), device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
    values = torch.stack(losses).tolist()
    if not np.isfinite(values).all():
        raise FloatingPointError(f"{name}: the loss is not finite; lower --learning_rate")
    return values, (time.perf_counter() - begun) / args.steps


def smoothed(losses, window):
    """Means over `window` steps, one for each step from the `window`-th on."""
    return np.convolve(losses, np.full(window, 1 / window), "valid")


def largest_difference(curves, first, second, window):
    """(of the smoothed losses, at which step) after the first `window` steps."""
    difference = np.abs(smoothed(curves[first], window) - smoothed(curves[second], window))
    place = int(difference.argmax())
    return round(float(difference[place]), 5), place + window


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train_file", nargs="+", required=True, help="text files, folders, tar archives, JSON lines or CSV")
    add("--model", choices=["bert", "gpt2"], default="gpt2")
    add("--steps", type=int, default=1000)
    add("--length", type=int, default=512)
    add("--batch_size", type=int, default=32)
    add("--hidden_size", type=int, default=384, help="a multiple of 64, the head dimension")
    add("--layers", type=int, default=6)
    add("--vocab_size", type=int, default=8192, help="of the tokenizer, which is trained on the text")
    add("--dropout", type=float, default=0.1)
    add("--learning_rate", type=float, default=5e-4)
    add("--seeds", type=int, choices=[1, 2], default=2, help="dropout seeds of transformers")
    add("--window", type=int, default=50, help="steps that a point of the smoothed loss is the mean of")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    if args.hidden_size % 64 or not 0 < args.window < args.steps:
        parser.error("--hidden_size must be a multiple of 64, and --window between 1 and --steps - 1")
    return args


def main(argv=None):
    args = parse(argv)
    with explain_mistakes("loss_curve.py"):
        writable_folder(args.output_dir)
        device = torch.device(args.device)
        facts = conditions(device)
        named, problems = read_texts(args.train_file)
        tell_problems(problems)
        texts = [text for _, text in named]
        tokenizer = (train_word_pieces if args.model == "bert" else train_byte_pairs)(texts, args.vocab_size)
        batches = Batches(args, tokenizer, texts)
        runs = {"transformers": (False, 0), "flash_models": (True, 0)}
        if args.seeds == 2 and args.dropout:
            runs["transformers_other_seed"] = (False, 1)
        curves, speed = {}, {}
        path = args.output_dir / f"loss-curve-{args.model}.csv"
        for name, (fused, seed) in runs.items():
            curves[name], speed[name] = train(name, fused, seed, args, tokenizer, batches, device)
            rows = [dict(zip(curves, values, strict=True)) for values in zip(*curves.values(), strict=True)]
            write_csv([{"step": step, **row} for step, row in enumerate(rows, 1)], facts, path)
        window = args.window
        draw_loss_curves({name: smoothed(losses, window) for name, losses in curves.items()}, window, facts,
                         path.with_suffix(".png"))  # fmt: skip
    settings = {key: value for key, value in vars(args).items() if isinstance(value, (int, float, str))}
    del settings["device"]
    report = {"benchmark": "loss_curve", **facts, **settings, "tokens": batches.rows.numel()}
    report["final_loss"] = {name: round(float(smoothed(losses, window)[-1]), 4) for name, losses in curves.items()}
    report["ms_per_step"] = {name: round(seconds * 1e3, 2) for name, seconds in speed.items()}
    for other in [name for name in runs if name != "transformers"]:
        difference, step = largest_difference(curves, "transformers", other, window)
        report[f"largest_difference_{other}"] = difference
        print(f"largest difference of the losses smoothed over {window} steps, transformers and {other}: {difference} "
              f"(at step {step})")  # fmt: skip
    print(json.dumps({**report, "csv": str(path)}))
    return report


if __name__ == "__main__":
    main()
