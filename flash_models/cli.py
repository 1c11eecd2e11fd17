# SPDX-License-Identifier: Apache-2.0
"""The command `flash-models`: what is installed, longer checkpoints, model cards, uploads.

  flash-models info
  flash-models convert BAAI/bge-base-en-v1.5 bge-base-en-8k --max_length 8192
  flash-models convert google-bert/bert-base-uncased bert-16k --max_length 16384 --pattern local_global --window 1024 --global 128
  flash-models card model_cards/pathx-16k-flash --results eval/results/pathx-16k-flash/all_results.json
  flash-models upload model_cards/pathx-16k-flash your-name/pathx-16k-flash

`flash-models COMMAND --help` explains a command.
"""  # noqa: E501 (a command stays on one line)

import argparse
import json
import re
import sys

PATTERN_FIELDS = ("window", "global", "random", "seed", "stride", "radius", "height", "width", "block_size")


def parse_args(argv=None):
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="flash-models", description=__doc__, **raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, text, add_arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=text.split("\n")[0], description=text, **raw)
        command.set_defaults(run=function)
        add_arguments(command.add_argument)
    return parser.parse_args(argv)


def _info_arguments(add):
    pass


def info(args):
    import flash_models

    from .checkpoints import CHECKPOINTS

    print(flash_models.info())
    for checkpoint in CHECKPOINTS.values():
        print(f"{'checkpoint':<13}{checkpoint.name}: {checkpoint.title}, {checkpoint.max_tokens:,} tokens")


def _convert_arguments(add):
    add("model", metavar="MODEL", help="BERT or GPT-2 checkpoint with safetensors weights: folder or Hub id")
    add("out", metavar="OUT", help="new folder for the result")
    add("--max_length", type=int, help="tokens that the result takes (default: as many as MODEL)")
    add(
        "--method",
        choices=("interpolate", "tile", "interpolate_2d"),
        default="interpolate",
        help="how the position table grows: stretched over the text, repeated, or stretched over a square image of "
        "max_length pixels (default: %(default)s)",
    )
    add("--revision", help="branch, tag or commit of MODEL on the Hub")
    add("--block_sparse", metavar="JSON", help="a block-sparse pattern with all its fields, also one for each head")
    add(
        "--pattern",
        help="block-sparse pattern: local, local_global, bigbird, strided, butterfly or grid_2d (default: exact "
        "attention)",
    )
    add("--window", type=int, help="all but strided, grid_2d: tokens that a token sees to either side")
    add("--global", type=int, help="all but local, strided: leading tokens that see, and are seen by, everything")
    add("--random", type=int, help="bigbird: random blocks that a block of tokens sees")
    add("--seed", type=int, help="bigbird: which random blocks (default: 0)")
    add("--stride", type=int, help="strided: a token sees as far to either side, and every stride-th token beyond")
    add("--radius", type=int, help="grid_2d: tiles that a tile sees to every side")
    add("--height", type=int, help="grid_2d: of the image in pixels (default: square)")
    add("--width", type=int, help="grid_2d: of the image in pixels (default: square)")
    add("--block_size", type=int, choices=(64, 128), help="of the pattern, in tokens (default: 128, grid_2d 64)")


def convert(args):
    fields = {name: getattr(args, name) for name in PATTERN_FIELDS if getattr(args, name) is not None}
    if args.pattern is None and fields:
        raise ValueError(f"--{', --'.join(fields)} belong to a block-sparse pattern; name it with --pattern")
    block_sparse = None if args.pattern is None else {"pattern": args.pattern, **fields}
    if args.block_sparse is not None:
        if block_sparse is not None:
            raise ValueError("got --block_sparse and --pattern; give the pattern in one of the two ways")
        block_sparse = json.loads(args.block_sparse)  # a mistake in it is a ValueError

    from .long_context import convert_checkpoint

    options = {"method": args.method, "block_sparse": block_sparse, "revision": args.revision}
    model = convert_checkpoint(args.model, args.out, args.max_length, **options)
    tokens = f"{model.config.max_position_embeddings:,} tokens"
    attention = "exact" if block_sparse is None else block_sparse["pattern"]
    print(f"{args.out}: {type(model).__name__}, {tokens}, attention {attention}")


def _card_arguments(add):
    add("folder", metavar="FOLDER", help="of the checkpoint, with its config.json")
    add("--results", metavar="JSON", help="all_results.json of an evaluation script: the scores of the card")
    add("--license", help="licence of the weights, such as apache-2.0, if the card does not name one yet")
    add("--dataset", metavar="ORG/NAME", help="benchmark on the Hub to which the scores belong: fills .eval_results")


def card(args):
    from .cards import write_card

    print(write_card(args.folder, args.results, args.license, args.dataset))


def _upload_arguments(add):
    add("folder", metavar="FOLDER", help="checkpoint with config.json, safetensors weights and README.md")
    add("repo_id", metavar="ORG/NAME", help="repository on the Hub; made if it is not there")
    add("--private", action="store_true", help="make a new repository private")
    add("--revision", help="branch to upload to; made if it is not there (default: main)")


def upload(args):
    from huggingface_hub import HfApi, get_token

    from .checkpoints import check_folder

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo_id):
        raise ValueError(f"a repository is named ORG/NAME, such as your-name/pathx-16k-flash; got {args.repo_id!r}")
    files = check_folder(args.folder)
    if get_token() is None:
        raise ValueError("no token for the Hub: run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    # None leaves an organisation's default visibility alone
    api.create_repo(args.repo_id, private=args.private or None, exist_ok=True)
    if args.revision is not None and args.revision != "main":
        api.create_branch(args.repo_id, branch=args.revision, exist_ok=True)
    print(f"uploading {len(files)} files to {args.repo_id}", file=sys.stderr)
    commit = api.upload_folder(
        repo_id=args.repo_id,
        folder_path=args.folder,
        revision=args.revision,
        commit_message="Upload checkpoint",
        allow_patterns=[re.sub(r"([*?[])", r"[\1]", file) for file in files],
    )
    print(commit.commit_url)


def _kernel_arguments(add):
    add("out", metavar="OUT", help="new folder for the kernel")


def kernel(args):
    from .hub_kernel import write_kernel

    print(write_kernel(args.out))


COMMANDS = {
    "info": (info, "Say what is installed and which kernels this machine uses.", _info_arguments),
    "convert": (
        convert,
        "Make a BERT or GPT-2 checkpoint longer, block-sparse or both.\n\n"
        "A dense result keeps its model type and loads anywhere. A block-sparse one becomes a flash_bert or\n"
        "flash_gpt2, which needs this library: plain transformers would silently run it dense. A longer position\n"
        "table is a start for fine-tuning.",
        _convert_arguments,
    ),
    "card": (
        card,
        "Write or update the README.md of a checkpoint: metadata, and scores from a results file.\n\n"
        "What is written there by hand stays, except for the lines between <!-- results --> and <!-- /results -->.",
        _card_arguments,
    ),
    "upload": (
        upload,
        "Check a checkpoint folder and upload it to the Hugging Face Hub.\n\n"
        "Log in first with `hf auth login`, or set HF_TOKEN. Refused are folders with damaged or missing weights and\n"
        "with files that run code when they are loaded (*.bin, *.pt, *.pkl). If an upload is cut off, run the same\n"
        "command again: the repository stays as it was until all is there, and large files are not sent twice.",
        _upload_arguments,
    ),
    "kernel": (
        kernel,
        "Write the op alone in the layout of the package `kernels`.\n\n"
        "`kernels.get_local_kernel(OUT).attention` is then flash_models.attention, without transformers;\n"
        "`hf upload --type kernel` publishes the folder.",
        _kernel_arguments,
    ),
}


def _without_token(message):
    from huggingface_hub import get_token

    token = get_token()
    return message.replace(token, "***") if token else message


def _reason(error):
    """The message of `error` and of what caused it, if that says more."""
    reasons = [str(error).strip() or type(error).__name__]
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        reasons.append(str(error.__cause__).strip())
    return " ".join(reasons)


def _is_network_error(error):
    """Whether it comes from the HTTP library of huggingface_hub, which is httpx or httpx2."""
    return type(error).__module__.startswith("httpx")


def main(argv=None):
    args = parse_args(argv)
    try:
        args.run(args)
    except Exception as error:
        # what a wrong argument, file or connection raises: the message says it all, a traceback would hide it
        if not isinstance(error, (ValueError, OSError, RuntimeError)) and not _is_network_error(error):
            raise
        cut_off = _is_network_error(error) or _is_network_error(error.__cause__)
        again = "; run the same command again to continue" if cut_off else ""
        raise SystemExit(f"flash-models: {_without_token(_reason(error))}{again}") from None


if __name__ == "__main__":
    main()
