# SPDX-License-Identifier: Apache-2.0
"""The parts of the text scripts that need no model: files, labels, batches, the F1 metric, the threshold."""

import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest
from metrics.multilabel_f1 import bootstrap_weights, document_counts, f1, f1_with_interval
from tasks.document_model import best_threshold, decide
from tasks.documents import label_matrix, label_set, load_documents, read_documents
from tasks.sweep import number_list
from tasks.text_files import read_rows, read_texts, tell_problems
from tasks.token_batches import group_by_length, pack, pad, step_indices

METRICS = Path(__file__).resolve().parents[1] / "eval" / "metrics"


def test_csv_with_long_quoted_and_broken_lines(tmp_path):
    long = "sun " * 50_000  # longer than the csv module's own limit
    lines = ["text,label", f'"{long}",a', '"two\nlines, and a comma",b', "one,two,three", "", '"never ends,c', "more,d"]
    (tmp_path / "x.csv").write_text("\n".join(lines) + "\n")
    rows = read_rows(tmp_path / "x.csv")
    assert [(place, row["label"]) for place, row in rows] == [("x.csv:2", "a"), ("x.csv:3", "b")]
    assert rows[0][1]["text"] == long and rows[1][1]["text"] == "two\nlines, and a comma"
    assert [problem.split(": ")[0] for problem in rows.problems] == ["x.csv:5", "x.csv:7"]
    (tmp_path / "x.tsv").write_text("text\tlabel\none, two\ta\n")
    assert read_rows(tmp_path / "x.tsv") == [("x.tsv:2", {"text": "one, two", "label": "a"})]


def test_json_in_all_its_wrappings(tmp_path):
    content = [{"text": "é", "label": 1}, {"text": "sun", "label": 2}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in content).encode()
    for name, data in (
        ("x.jsonl", lines),
        ("x.json", json.dumps(content).encode()),
        ("x.jsonl.gz", gzip.compress(lines)),
        ("x.jsonl.xz", lzma.compress(lines)),
    ):
        (tmp_path / name).write_bytes(data)
        assert [row for _, row in read_rows(tmp_path / name)] == content
    (tmp_path / "y.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n' + b"[" * 100_000 + b'\n{"text": "b"}')
    rows = read_rows(tmp_path / "y.jsonl")
    assert [place for place, _ in rows] == ["y.jsonl:1", "y.jsonl:4"] and len(rows.problems) == 2
    shown = []
    tell_problems([f"x:{n}" for n in range(9)], shown.append)
    assert len(shown) == 6 and shown[-1].endswith("9 lines in all")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 999)[:-20], "damaged or cut short"),
        ("x.jsonl.gz", gzip.compress(b"{}")[:-4], "damaged or cut short"),
        ("x.json", b'[{"text": "a"},', "begins like a JSON array"),
        ("x.csv", "text,label\né,a\n".encode("latin-1"), "not UTF-8"),
        ("x.parquet", b"PAR1", "expected one of .jsonl"),
        ("x.jsonl", b"", "holds no rows"),
    ],
    ids=["cut-xz", "cut-gz", "array", "latin-1", "parquet", "empty"],  # gzip writes the time into its bytes
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)


def archive(path, members):
    with tarfile.open(path, "w:xz") as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("books/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    return path


def test_archives_are_read_in_memory(tmp_path, monkeypatch):
    members = [("books/b.txt", b"second"), ("../a.txt", b"first"), ("books/cover.png", b"x"), ("books/empty.txt", b" ")]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = archive(tmp_path / "here" / "books.tar.xz", members)
    texts, problems = read_texts([path])
    assert texts == [("../a.txt", "first"), ("books/b.txt", "second")] and not problems
    assert not list(tmp_path.rglob("*.txt"))
    with monkeypatch.context() as patch:
        patch.setattr("tasks.text_files.MAX_TEXT_BYTES", 5)
        with pytest.raises(ValueError, match="b.txt.*6 bytes; at most 5"):
            read_texts([path])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_texts([path])


def test_texts_of_folders_and_rows(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "b.txt.gz").write_bytes(gzip.compress(b"bb"))
    (tmp_path / "in" / "a.txt").write_text("aa")
    (tmp_path / "in" / "c.bin").write_bytes(b"\0")
    (tmp_path / "x.jsonl").write_text('{"facts": ["one", "two"]}\n{"facts": null}\n')
    texts, problems = read_texts([tmp_path / "in", tmp_path / "x.jsonl"])
    assert [text for _, text in texts] == ["aa", "bb", "one\ntwo"] and "x.jsonl:2" in problems[0]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no text"):
        read_texts([tmp_path / "none"])
    with pytest.raises(ValueError, match="c.bin is neither"):
        read_texts([tmp_path / "in" / "c.bin"])


def test_labels(tmp_path):
    rows = [{"text": "a", "labels": ["10", "2", "2"]}, {"text": "b", "labels": []}, {"text": "c", "labels": [7]}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    documents = read_documents(tmp_path / "x.jsonl")
    assert documents.multi_label and label_set(documents) == ["2", "7", "10"]
    matrix, unknown = label_matrix(documents, ["2", "10"])
    assert matrix.tolist() == [[True, True], [False, False], [False, False]] and unknown == {"7": 1}
    rest, held = documents.split(0.01)
    assert sorted(rest.texts + held.texts) == ["a", "b", "c"] and len(held) == 1
    assert documents.split(0.01)[1].texts == held.texts


def test_a_split_keeps_the_shares_of_the_classes(tmp_path):
    rows = [{"text": f"{number}", "label": "rare" if number % 5 == 0 else "common"} for number in range(50)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    documents = read_documents(tmp_path / "x.jsonl")
    rest, held = documents.split(0.2)
    assert sorted(rest.texts + held.texts) == sorted(documents.texts)
    assert sum(label == ["rare"] for label in held.labels) == 2 and len(held) == 10
    with pytest.raises(ValueError, match="has 1 documents: too few"):
        held.select([0]).split(0.5)


def test_class_numbers_of_a_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    labels = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": labels})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, -1, 0]}, features=features)
    data.to_parquet(tmp_path / "test.parquet")
    documents = load_documents(str(tmp_path), None, "test")
    assert documents.labels == [["yes"], ["no"]] and "test row 2: column 'label' holds None" in documents.problems[0]
    assert load_documents(str(tmp_path), None, "train") is None


def test_batches_stay_within_their_budget():
    lengths = np.random.default_rng(0).integers(1, 100, 200).tolist()
    for unpad in (False, True):
        groups = group_by_length(lengths, 150, unpad)
        assert sorted(place for group in groups for place in group) == list(range(200))
        sizes = [sum(lengths[p] for p in g) if unpad else max(lengths[p] for p in g) * len(g) for g in groups]
        assert max(sizes) <= 150 and np.mean(sizes) > 100
    assert group_by_length([5, 300, 5], 150, False) == [[1], [0, 2]]
    sequences = [np.array([4, 5], np.int32), np.array([6], np.int32)]
    assert pad(sequences, 9)["input_ids"].tolist() == [[4, 5], [6, 9]]
    packed = pack(sequences)
    assert packed["input_ids"].tolist() == [[4, 5, 6]] and packed["position_ids"].tolist() == [[0, 1, 0]]
    assert packed["cu_seq_lens_q"].tolist() == [0, 2, 3] and packed["max_length_q"] == 2


def test_every_epoch_has_every_document_once():
    steps = [step_indices(7, step, 3, seed=5) for step in range(14)]
    row = [index for step in steps for index in step]
    epochs = [row[first : first + 7] for first in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1]
    assert step_indices(7, 0, 3, seed=6) != steps[0]


def test_f1():
    predictions = [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    references = [[1, 0, 0], [0, 1, 0], [1, 0, 0]]
    result = f1_with_interval(predictions, references, ["a", "b", "c"])
    assert result["f1"] == result["micro_f1"] == pytest.approx(4 / 6)  # 2 hits, 1 wrong, 1 missed
    assert result["macro_f1"] == pytest.approx((1 / 2 + 1) / 2)  # c is nowhere
    assert result["per_label"]["a"] == {"f1": 0.5, "support": 2, "predicted": 2}
    low, high = result["ci95"]
    assert low < result["f1"] < high == 1.0
    metric = pytest.importorskip("evaluate").load(str(METRICS / "multilabel_f1.py"))
    assert metric.compute(predictions=predictions, references=references, labels=["a", "b", "c"]) == result
    nothing = f1_with_interval(np.zeros((2, 2)), np.zeros((2, 2)))
    assert nothing["f1"] == nothing["macro_f1"] == 0.0
    for wrong in ([[1, 0]], [1, 0, 1]):
        with pytest.raises(ValueError, match="expected two equal"):
            f1_with_interval(wrong, references)


def test_interval_covers_what_it_should():
    """Of samples of 200 from a population whose micro-F1 is known, about 95% have it in their interval."""
    generator = np.random.default_rng(0)
    truth = generator.random((20_000, 4)) < 0.3
    said = truth ^ (generator.random(truth.shape) < 0.1)
    right = f1(*document_counts(said, truth).sum(0))
    inside = 0
    for _ in range(100):
        drawn = generator.integers(0, len(truth), 200)
        low, high = f1_with_interval(said[drawn], truth[drawn])["ci95"]
        inside += low <= right <= high
    assert 88 <= inside <= 99
    assert bootstrap_weights(50).sum(1).tolist() == [50] * 1000


@pytest.mark.parametrize("seed", range(5))
def test_best_threshold(seed):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 8, (12, 3)) / 8
    truth = generator.random((12, 3)) < 0.3 + 0.4 * (scores > 0.5)
    values = {t: f1(*document_counts(scores > t, truth).sum(0)) for t in np.arange(-1, 17) / 16}
    chosen = best_threshold(scores, truth)
    assert f1(*document_counts(decide(scores, chosen), truth).sum(0)) == pytest.approx(max(values.values()))
    assert decide(scores, None).sum(1).tolist() == [1] * 12


def test_number_list():
    import argparse

    assert number_list("4096,512,512") == [512, 4096]
    for wrong in ("512,x", "", "-1"):
        with pytest.raises(argparse.ArgumentTypeError):
            number_list(wrong)
