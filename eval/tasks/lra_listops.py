# SPDX-License-Identifier: Apache-2.0
"""ListOps of the Long Range Arena (arXiv 2011.04006, after Nangia & Bowman, arXiv 1804.06028): nested lists of digits
under MIN, MAX, MED (the median, rounded down) and SM (the sum modulo 10); the label is the value of the whole.

An expression is a function of (split, number, base seed) alone, whoever makes it and whenever. It grows from its root:
a node above depth 10 is an operator with probability 1/4, with 2 to 10 arguments, and otherwise a digit; what has 500
tokens or fewer, or 2,000 or more, is thrown away. Brackets count: an operator opens its list, "]" closes it.
"""

import concurrent.futures
import multiprocessing
import os
import random
import warnings
import zipfile
from pathlib import Path

import numpy as np
from tasks.pathfinder_data import write_whole
from tasks.training_loop import bar_interval
from tqdm.auto import tqdm

OPERATORS = ("MIN", "MAX", "MED", "SM")
CLOSE = 10 + len(OPERATORS)  # ids: the digits are 0 to 9, then the operators
WORDS = {**{str(digit): digit for digit in range(10)}, **{f"[{name}": 10 + n for n, name in enumerate(OPERATORS)}}
WORDS["]"] = CLOSE
MAX_DEPTH, MAX_ARGUMENTS, OPERATOR_SHARE = 10, 10, 0.25
SHORTEST, LONGEST = 501, 1999  # tokens
SPLITS = {"train": 96_000, "validation": 2_000, "test": 2_000}
GENERATOR_VERSION = 1  # raise it when a number no longer gives the same expression; caches are then made anew
SHARD, CHUNK = 8_000, 250  # expressions in a file of the cache, and in one task of a process


class TooLong(Exception):
    pass


def apply(operator, values):
    """The value of an operator, its number in OPERATORS, over digits."""
    if operator == 3:
        return sum(values) % 10
    ranked, count = sorted(values), len(values)
    if operator == 2:
        return (ranked[(count - 1) // 2] + ranked[count // 2]) // 2
    return ranked[0] if operator == 0 else ranked[-1]


def _grow(draw, tokens, depth):
    """Append a random expression to `tokens`; returns its value. Only `Random.random` is drawn from: Python promises
    that its numbers stay the same."""
    if depth == MAX_DEPTH or draw() >= OPERATOR_SHARE:
        tokens.append(int(draw() * 10))
        return tokens[-1]
    operator, count = int(draw() * len(OPERATORS)), 2 + int(draw() * (MAX_ARGUMENTS - 1))
    tokens.append(10 + operator)
    values = [_grow(draw, tokens, depth + 1) for _ in range(count)]
    tokens.append(CLOSE)
    if len(tokens) > LONGEST:
        raise TooLong
    return apply(operator, values)


def expression(split, number, base_seed=0):
    """(tokens uint8, value): expression `number` of a split."""
    draw = random.Random(f"listops {base_seed} {split} {number}").random
    while True:
        tokens = []
        try:
            value = _grow(draw, tokens, 1)
        except TooLong:
            continue
        if len(tokens) >= SHORTEST:
            return np.array(tokens, np.uint8), value


def parse(text):
    """Tokens uint8 of an expression such as "[MAX 3 [MIN 1 2 ] ]", with or without the round brackets of the released
    files. Raises ValueError where it is none."""
    tokens, depth = [], 0
    for word in text.replace("(", " ").replace(")", " ").split():
        if word not in WORDS:
            raise ValueError(f"{word!r} is no part of a ListOps expression; known are {' '.join(WORDS)}")
        tokens.append(WORDS[word])
        depth += (10 <= tokens[-1] < CLOSE) - (tokens[-1] == CLOSE)
        if depth < 0:
            raise ValueError("a ] closes a list that nothing opened")
    if depth or not tokens:
        raise ValueError(f"{depth} lists are not closed" if depth else "the expression is empty")
    return np.array(tokens, np.uint8)


def _chunk(split, first, last, base_seed):
    made = [expression(split, number, base_seed) for number in range(first, last)]
    return [tokens for tokens, _ in made], [value for _, value in made]


def _read(path, count):
    """(list of uint8 arrays, labels) of a file of the cache, or None where there is no whole one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            tokens, lengths, labels = file["tokens"], file["lengths"], file["labels"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        warnings.warn(f"{path} is damaged and made anew: {error}", stacklevel=3)
        return None
    if len(labels) < count or lengths.sum() != len(tokens) or len(lengths) != len(labels):
        return None
    return np.split(tokens, np.cumsum(lengths[:count]))[:count], labels[:count].tolist()


def _keep(path, sequences, labels):
    arrays = {"tokens": np.concatenate(sequences), "lengths": [len(sequence) for sequence in sequences]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: np.savez(file, labels=np.array(labels, np.uint8), **arrays))
    except OSError as error:
        warnings.warn(f"cannot write the cache {path} ({error}); expressions stay in memory", stacklevel=3)


def load(split, count=None, cache_dir=None, num_workers=None, base_seed=0, show=False):
    """(list of uint8 arrays, list of labels): expressions 0 .. count - 1 of a split, the published number if None.

    What was made is kept in `cache_dir`, in files that are there whole or not at all, so that an interrupted making is
    continued. num_workers: processes (default: a core each)."""
    if split not in SPLITS:
        raise ValueError(f"ListOps has no split {split!r}, but {', '.join(SPLITS)}")
    count = SPLITS[split] if count is None else count
    workers = len(os.sched_getaffinity(0)) if num_workers is None else num_workers
    sequences, labels, pool = [], [], None
    with tqdm(total=count, desc=f"ListOps {split}", disable=not show, mininterval=bar_interval()) as bar:
        for first in range(0, count, SHARD):
            last = min(first + SHARD, count)
            name = f"listops-v{GENERATOR_VERSION}-{base_seed}-{split}-{first // SHARD:03d}.npz"
            path = Path(cache_dir) / name if cache_dir else None
            found = path and _read(path, last - first)
            if not found:
                found = [], []
                if workers > 1 and pool is None:
                    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))
                spans = [(start, min(start + CHUNK, last)) for start in range(first, last, CHUNK)]
                jobs = [[split] * len(spans), *zip(*spans, strict=True), [base_seed] * len(spans)]
                for part in (map if pool is None else pool.map)(_chunk, *jobs):
                    for kept, new in zip(found, part, strict=True):
                        kept += new
                    bar.update(len(part[1]))
                if path:
                    _keep(path, *found)
            sequences += found[0]
            labels += found[1]
            bar.update(last - bar.n)
    if pool is not None:
        pool.shutdown()
    return sequences, labels
