# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of new models, trained on their own text: word pieces for BERT, byte pairs for GPT-2.

A small model cannot afford the 30,522 or 50,257 rows of the usual ones: at width 256 they are 16 or 26 MB in bf16.
"""

from pathlib import Path

import transformers
from tasks.training_state import STATE_FILE
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
END_OF_TEXT = "<|endoftext|>"


def _parts(texts, characters=100_000):
    """The texts in parts, so that a book is not one item of the trainer."""
    for text in texts:
        for first in range(0, len(text), characters):
            yield text[first : first + characters]


def train_word_pieces(texts, vocab_size):
    """Uncased BertTokenizer. Not the same twice: the trainer numbers the pieces, and chooses among equally frequent
    ones, as it likes."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    options = {"special_tokens": BERT_SPECIAL, "show_progress": False, "limit_alphabet": 400}
    core.train_from_iterator(_parts(texts), trainers.WordPieceTrainer(vocab_size=vocab_size, **options))
    vocab = dict(sorted(core.get_vocab().items(), key=lambda item: item[1]))
    return transformers.BertTokenizer(vocab=vocab, do_lower_case=True)


def train_byte_pairs(texts, vocab_size):
    """GPT2Tokenizer: every text has tokens, because every byte is one."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": [END_OF_TEXT], "show_progress": False, "initial_alphabet": alphabet}
    core.train_from_iterator(_parts(texts), trainers.BpeTrainer(vocab_size=vocab_size, **options))
    special = dict.fromkeys(("eos_token", "bos_token", "unk_token"), END_OF_TEXT)
    return transformers.GPT2Tokenizer(tokenizer_object=core, **special)


def find_tokenizer(args, accelerator, texts, train):
    """The tokenizer of --tokenizer_name, else of the model, else one of --vocab_size tokens that `train` makes of the
    texts. The last is kept in <output_dir>/tokenizer; a resumed run takes the one that it began with."""
    name = args.tokenizer_name or args.model_name_or_path
    if name is None:
        own = Path(args.output_dir, "tokenizer")
        if args.resume_from_checkpoint:
            before = Path(args.resume_from_checkpoint)
            kept = [folder for folder in (before / "tokenizer", before.parent / "tokenizer") if folder.is_dir()]
            if not kept:
                raise ValueError(f"no tokenizer in {before}, where the run began; name it with --tokenizer_name")
            own = kept[0]
        elif any(own.parent.rglob(STATE_FILE)):
            raise ValueError(
                f"{own.parent} holds the training state of an earlier run, that a new tokenizer would spoil; go "
                f"on with it (--resume_from_checkpoint {own.parent}) or choose another --output_dir"
            )
        elif accelerator.is_main_process:
            accelerator.print(f"training a tokenizer of {args.vocab_size:,} tokens")
            train(texts, args.vocab_size).save_pretrained(own)
        accelerator.wait_for_everyone()
        name = str(own)
    return transformers.AutoTokenizer.from_pretrained(name)
