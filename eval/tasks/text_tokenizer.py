# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of new models, trained on their own text: word pieces for BERT, byte pairs for GPT-2.

A small model cannot afford the 30,522 or 50,257 rows of the usual ones: at width 256 they are 16 or 26 MB in bf16.
"""

from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
END_OF_TEXT = "<|endoftext|>"


def _parts(texts, characters=100_000):
    """The texts in parts, so that a book is not one item of the trainer."""
    for text in texts:
        for first in range(0, len(text), characters):
            yield text[first : first + characters]


def train_word_pieces(texts, vocab_size):
    """Uncased BertTokenizer."""
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
    texts. The last is kept in the output folder, where a resumed run finds it."""
    name = args.tokenizer_name or args.model_name_or_path
    if name is None:
        name = str(Path(args.output_dir, "tokenizer"))
        if accelerator.is_main_process and not Path(name).exists():
            accelerator.print(f"training a tokenizer of {args.vocab_size:,} tokens")
            train(texts, args.vocab_size).save_pretrained(name)
        accelerator.wait_for_everyone()
    return transformers.AutoTokenizer.from_pretrained(name)
