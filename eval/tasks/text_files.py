# SPDX-License-Identifier: Apache-2.0
"""Rows and texts from files (also .xz and .gz), folders, tar archives and Hub datasets.

A line that cannot be read is left out and told about with its number; a file of which nothing can be read is an error.
Archives are read in memory: nothing is extracted, so no path inside of one matters.
"""

import csv
import gzip
import io
import json
import lzma
import sys
import tarfile
import zlib
from pathlib import Path

DAMAGED = (lzma.LZMAError, EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError)
COMPRESSED = {".xz": lzma.open, ".gz": gzip.open}
ROWS = (".jsonl", ".json", ".csv", ".tsv")
TEXTS = (".txt", ".md")
ARCHIVES = (".tar", ".tar.xz", ".tar.gz", ".tgz")
MAX_TEXT_BYTES = 1 << 28  # of one member of an archive, so that a small archive cannot fill the memory


class Rows(list):
    """(place, row) pairs, where place is "file:line" and row a dict; `problems` says what was left out and why."""

    def __init__(self, rows=(), problems=()):
        super().__init__(rows)
        self.problems = list(problems)

    def skip(self, place, reason):
        self.problems.append(f"{place}: {reason}")


def kind_of(path):
    """The file name's ending without that of its compression: ".jsonl" for x.jsonl.xz."""
    path = Path(path)
    return (Path(path.stem) if path.suffix in COMPRESSED else path).suffix.lower()


def _content(path):
    """The bytes of a file, decompressed. Raises ValueError where it is damaged, OSError where it cannot be opened."""
    try:
        with COMPRESSED.get(Path(path).suffix, open)(path, "rb") as file:
            return file.read()
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); get it again") from None


def _json_rows(path):
    content, name, rows = _content(path), Path(path).name, Rows()
    if kind_of(path) == ".json" and content.lstrip()[:1] == b"[":  # one array
        try:
            items = [(f"{name}, item {number}", item) for number, item in enumerate(json.loads(content), 1)]
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} begins like a JSON array but is none ({error}); write one object a line"
            ) from None
    else:
        items = [(f"{name}:{number}", line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    for place, item in items:
        try:
            row = json.loads(item) if isinstance(item, bytes) else item
        except (ValueError, RecursionError) as error:
            rows.skip(place, f"no JSON ({error})")
            continue
        if isinstance(row, dict):
            rows.append((place, row))
        else:
            rows.skip(place, f"a JSON {type(row).__name__}; expected an object")
    return rows


def _csv_rows(path, columns):
    try:
        text = _content(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); convert it, for example with iconv") from None
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is a short document
    quoting = csv.QUOTE_MINIMAL if columns is None else csv.QUOTE_NONE
    options = {"delimiter": "\t" if kind_of(path) == ".tsv" else ",", "strict": True, "quoting": quoting}
    reader = csv.reader(io.StringIO(text, newline=""), **options)
    name, rows, header, line = Path(path).name, Rows(), columns, 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            rows.skip(f"{name}:{line}", f"no CSV ({error})")
            fields = []
        if fields is None:
            return rows
        if header is None:
            header = fields
        elif fields and len(fields) != len(header):
            rows.skip(f"{name}:{line}", f"{len(fields)} fields; the header names {len(header)}")
        elif fields:
            rows.append((f"{name}:{line}", dict(zip(header, fields, strict=True))))
        line = reader.line_num + 1


def read_rows(path, columns=None):
    """Rows of a JSON-lines, JSON or CSV file. Raises ValueError where not one line can be read.

    columns: of a CSV file that has neither a header nor quotes."""
    kind = kind_of(path)
    if kind not in ROWS:
        raise ValueError(f"{path} ends in {kind!r}; expected one of {', '.join(ROWS)}, optionally with .xz or .gz")
    rows = _csv_rows(path, columns) if kind in (".csv", ".tsv") else _json_rows(path)
    if not rows:
        first = f" The first: {rows.problems[0]}" if rows.problems else ""
        raise ValueError(f"{path} holds no rows; {len(rows.problems)} lines cannot be read.{first}")
    return rows


def _name(names, number):
    """The class's name; None for the missing number, or -1, of a test set without labels."""
    return None if number is None or number < 0 else names[number]


def read_dataset(name, config, split):
    """Rows of a split of a Hub dataset (or of a folder that `datasets` can load), class numbers as their names.

    Returns None where there is no such split."""
    import datasets

    loaded = datasets.load_dataset(name, config)
    if split not in loaded:
        return None
    data = loaded[split]
    names = {}
    for column, feature in data.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.ClassLabel):
            names[column] = inner.names
    rows = Rows()
    for number, row in enumerate(data, 1):
        for column, known in names.items():
            value = row[column]
            row[column] = [known[item] for item in value] if isinstance(value, list) else _name(known, value)
        rows.append((f"{name}, {split} row {number}", row))
    return rows


def join_text(value):
    """A text, or paragraphs joined by line breaks; None where it is neither."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    return value if isinstance(value, str) else None


def choose_column(rows, wanted, known, what, option):
    """`wanted`, or the first of the `known` names that a row has. Raises ValueError that lists the columns."""
    columns = sorted({column for _, row in rows[:100] for column in row})
    for column in [wanted] if wanted else known:
        if column in columns:
            return column
    missing = f"no column {wanted!r}" if wanted else f"none of the columns {', '.join(known)}"
    raise ValueError(f"no {what}: the rows have {missing} but {', '.join(map(repr, columns))}; name it with {option}")


def _archive(path):
    """(name, text) of the text files in a tar archive, in the order of their names."""
    found = []
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isfile() or Path(member.name).suffix.lower() not in TEXTS:
                    continue
                if member.size > MAX_TEXT_BYTES:
                    raise ValueError(
                        f"{member.name} in {path} has {member.size:,} bytes; at most {MAX_TEXT_BYTES:,} are read"
                    )
                found.append((member.name, archive.extractfile(member).read().decode("utf-8", "replace")))
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); get it again") from None
    return sorted(found)


TEXT_COLUMNS = ("text", "facts", "document", "sentence", "content")


def texts_of(rows, text_column=None):
    """[(place, text)] of the rows that have one; the others are added to `rows.problems`."""
    column = choose_column(rows, text_column, TEXT_COLUMNS, "text", "--text_column")
    found = []
    for place, row in rows:
        text = join_text(row.get(column))
        if text is None:
            rows.skip(place, f"column {column!r} holds {type(row.get(column)).__name__}; expected text")
        else:
            found.append((place, text))
    return found


def read_texts(paths, text_column=None):
    """([(name, text)], problems) of text files, folders of them, tar archives, JSON lines and CSV.

    Raises ValueError where there is not one text that is not empty."""
    texts, problems = [], []
    for path in map(Path, paths):
        name = path.name.lower()
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and kind_of(file) in TEXTS)
            texts += [(str(file.relative_to(path)), _content(file).decode("utf-8", "replace")) for file in inside]
        elif name.endswith(ARCHIVES):
            texts += _archive(path)
        elif kind_of(path) in ROWS:
            rows = read_rows(path)
            texts += texts_of(rows, text_column)
            problems += rows.problems
        elif kind_of(path) in TEXTS:
            texts.append((path.name, _content(path).decode("utf-8", "replace")))
        else:
            known = ", ".join((*TEXTS, *ROWS, *ARCHIVES))
            raise ValueError(f"{path} is neither a folder nor one of {known} (optionally with .xz or .gz)")
    texts = [(name, text) for name, text in texts if text.strip()]
    if not texts:
        raise ValueError(f"there is no text in {', '.join(map(str, paths))}; expected files ending in {TEXTS}")
    return texts, problems


def tell_problems(problems, show=print, shown=5):
    """One line for each of the first problems, and how many there are."""
    for problem in problems[:shown]:
        show(f"left out: {problem}")
    if len(problems) > shown:
        show(f"left out: {len(problems)} lines in all")
