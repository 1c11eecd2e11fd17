# SPDX-License-Identifier: Apache-2.0
"""BERT and GPT-2 models for the text scripts: from any checkpoint or new, longer, block-sparse, on the kernels."""

import json
from pathlib import Path

import torch
import transformers

import flash_models
from flash_models.long_context import METHODS

FAMILIES = {"bert": "Bert", "gpt2": "GPT2"}


def add_model_arguments(add):
    """The arguments that `load_model` reads."""
    add("--attn_implementation", choices=("io_aware", "sdpa", "eager"), default="io_aware")
    add("--block_sparse", help='attention pattern: {"pattern": "local_global", "window": 1024, "global": 128}')
    add("--extend_method", choices=METHODS[:2], default="interpolate", help="for lengths over the model's positions")
    add("--gradient_checkpointing", action="store_true", help="less memory, a third more time")


def add_language_model_arguments(add, family, tokenizer):
    """What is trained or evaluated: a checkpoint of `family`, such as "BERT", or a new model and `tokenizer`."""
    config = {"BERT": "FlashBertConfig", "GPT-2": "FlashGPT2Config"}[family]
    add("--model_name_or_path", help=f"{family} checkpoint: folder or Hub id; to train from scratch, leave out")
    add("--config_name", help=f"JSON of a {config} for a new model")
    add("--tokenizer_name", help="(default: the model's, or a new one of --vocab_size tokens)")
    add("--vocab_size", type=int, default=8192, help=f"of a new {tokenizer} tokenizer, trained on the training text")
    add("--output_dir", help="where everything is written (default for evaluation: eval/results/<model>)")


def check_language_model_arguments(args, parser):
    if not args.model_name_or_path and not (args.do_train and args.config_name):
        parser.error("give --model_name_or_path, or --do_train with the --config_name of a new model")


def parse_block_sparse(text):
    """The dict of --block_sparse, JSON as in `flash_models.layouts.from_config`; None for None."""
    if text is None:
        return None
    try:
        pattern = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--block_sparse {text!r} is no JSON ({error})") from None
    flash_models.layouts.check_config(pattern)
    return pattern


def new_config(path, family, tokenizer):
    """FlashBertConfig or FlashGPT2Config of a JSON file, with the tokenizer's size and special tokens."""
    try:
        values = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"--config_name {path} is no JSON ({error})") from None
    if values.pop("model_type", f"flash_{family}") not in (family, f"flash_{family}"):
        raise ValueError(f"--config_name {path} is of another family; expected {family} or flash_{family}")
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config_class = getattr(flash_models, f"Flash{FAMILIES[family]}Config")
    return config_class(**{**values, "vocab_size": len(tokenizer), **special})


def load_model(start, family, head, args, max_length, **options):
    """A `family` model ("bert", "gpt2") with `head`, such as "ForMaskedLM", for `max_length` tokens, in float32.

    start: a checkpoint (folder or Hub id), or the config of a new model. A block-sparse model is one of this library's
    classes, because plain transformers would run it dense; a dense one keeps its class. Weights are safetensors.
    Raises ValueError where the checkpoint is of another family."""
    new = isinstance(start, transformers.PretrainedConfig)
    config = start if new else transformers.AutoConfig.from_pretrained(start)
    if config.model_type not in (family, f"flash_{family}"):
        raise ValueError(f"{start} is a {config.model_type}; expected {family} or flash_{family}")
    pattern = parse_block_sparse(args.block_sparse)
    if pattern is not None:
        config.block_sparse = options["block_sparse"] = pattern
    flash = pattern is not None or config.model_type.startswith("flash_")
    name = f"{FAMILIES[family]}{head}"
    model_class = getattr(flash_models, f"Flash{name}") if flash else getattr(transformers, name)
    if new:
        model = model_class(config)
    else:
        model = model_class.from_pretrained(start, dtype=torch.float32, use_safetensors=True, **options)
    has_table = getattr(config, "position_embedding_type", "absolute") == "absolute"  # rotary positions have no end
    if has_table and model.config.max_position_embeddings < max_length:
        flash_models.extend_context(model, max_length, method=args.extend_method)
    if args.attn_implementation != "io_aware":
        model.set_attn_implementation(args.attn_implementation)
    elif not flash:
        flash_models.patch(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model
