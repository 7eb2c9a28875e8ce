"""Text as JSON Lines and CSV: rows by split, labels as numbers, faults by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.contract.errors import DatasetRejected
from tests.worker.loading.files import tarred, zipped
from worker.data import open_data
from worker.data.base import Data


def opened(content: bytes | str, folder: Path, name: str = "d.jsonl") -> Data:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_data(path, name, {}, folder)


def lines(*rows: object) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def test_json_lines(tmp_path: Path) -> None:
    rows = [
        {"text": "schön 🙂", "label": "pos"},
        {"text": "two\nlines", "label": "neg", "split": "test"},
        {"text": "", "label": "neg", "other": [1]},
        {"text": "no label", "split": "calibration"},
    ]
    data = opened("\ufeff" + lines(*rows) + "\n\n", tmp_path)
    assert data.facts.kind == "text"
    assert data.facts.labels == ("neg", "pos")
    assert {name: (s.samples, s.has_targets) for name, s in data.facts.splits.items()} == {
        "train": (2, True),
        "test": (1, True),
        "calibration": (1, False),
    }
    batch = data.splits["train"].read([1, 0])
    assert batch.inputs == ["", "schön 🙂"]
    assert batch.targets is not None
    assert batch.targets.tolist() == [0, 1]
    assert data.splits["test"].read([0]).inputs == ["two\nlines"]
    assert data.splits["calibration"].read([0]).targets is None


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv(tmp_path: Path, newline: str) -> None:
    rows = ["label,text,id", '2,"a, ""quoted""",x', f'0,"over{newline}two lines",y', "", "1,plain,z"]
    data = opened(newline.join(rows), tmp_path, "d.csv")
    assert data.facts.labels is None
    assert (data.facts.splits["train"].target_min, data.facts.splits["train"].target_max) == (0, 2)
    batch = data.splits["train"].read([0, 1, 2])
    assert batch.inputs == ['a, "quoted"', f"over{newline}two lines", "plain"]
    assert batch.targets is not None
    assert batch.targets.tolist() == [2, 0, 1]


def test_whole_numbers_are_class_numbers(tmp_path: Path) -> None:
    data = opened(lines({"text": "a", "label": 7}, {"text": "b", "label": 3}), tmp_path)
    assert data.facts.labels is None
    targets = data.splits["train"].read([0, 1]).targets
    assert targets is not None
    assert targets.tolist() == [7, 3]


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_an_archive_holds_a_file_a_split(tmp_path: Path, pack: object) -> None:
    files = {
        "reviews/train.jsonl": lines({"text": "a", "label": "x"}).encode(),
        "reviews/test.csv": b"text,label\nb,y\n",
        "reviews/LICENSE": b"free",
    }
    data = opened(pack(files), tmp_path, "d.zip")  # type: ignore[operator]
    assert data.facts.labels == ("x", "y")
    assert data.splits["test"].read([0]).inputs == ["b"]
    assert data.facts.splits["test"].target_min == 1


GOOD = '{"text": "good", "label": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.jsonl", GOOD + '{"text": \n', "line 2 is no JSON"),
        ("d.jsonl", GOOD + "[1, 2]\n", "line 2 is no JSON object"),
        ("d.jsonl", GOOD + "[" * 100_000, "line 2 is no JSON"),
        ("d.jsonl", '[{"text": "a", "label": 1}]', "JSON Lines"),
        ("d.jsonl", GOOD + '{"label": 1}\n', "line 2 has no string `text`"),
        ("d.jsonl", GOOD + '{"text": 5, "label": 1}\n', "line 2 has no string `text`"),
        ("d.jsonl", GOOD + '{"text": "a"}\n', "line 2 lacks a label"),
        ("d.jsonl", '{"text": "a"}\n' + GOOD, "line 2 has a label"),
        ("d.jsonl", GOOD + '{"text": "a", "label": 1.5}\n', "line 2 has the label '1.5'"),
        ("d.jsonl", GOOD + '{"text": "a", "label": true}\n', "line 2 has the label 'True'"),
        ("d.jsonl", GOOD + '{"text": "a", "label": 99999999999}\n', "line 2 has the label 99999999999"),
        ("d.jsonl", GOOD + '{"text": "a", "label": "bad"}\n', "strings and some are numbers"),
        ("d.jsonl", GOOD + '{"text": "a", "label": 1, "split": "dev"}\n', "split 'dev'"),
        ("d.jsonl", GOOD.encode() + b'{"text": "f\xfcr", "label": 1}\n', "line 2 is not UTF-8"),
        ("d.csv", "text,label\na,1\nb,1,2\n", "line 3 has 3 cells and the header 2"),
        ("d.csv", "text,label\na,1\nb\n", "line 3 has 1 cells"),
        ("d.csv", "sentence,label\na,1\n", "line 1 is no header"),
        ("d.csv", "text,text\na,1\n", "line 1 is no header"),
        ("d.csv", 'text,label\n"a" b,1\n', "line 2 is no CSV"),
        ("d.csv", 'text,label\n"never closed,1\n', "no CSV"),
        ("d.csv", "text,label\na,1\nb,\n", "line 3 lacks a label"),
        ("d.csv", "text,label\n", "no rows"),
        ("d.csv", b"text,label\na,1\nf\xfcr,2\n", "line 3 is not UTF-8"),
        ("d.csv", b"\n \n\n", "no rows"),
        ("d.csv", "text,label\n" + "a" * (17 << 20), "line 2 has more than 16777216 bytes"),
    ],
)
def test_faults_are_named_by_line(tmp_path: Path, name: str, content: bytes | str, words: str) -> None:
    with pytest.raises(DatasetRejected, match=words):
        opened(content, tmp_path, name)


def test_a_file_that_is_no_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetRejected, match=r"'val\.jsonl'"):
        opened(zipped({"val.jsonl": GOOD.encode()}), tmp_path, "d.zip")


def test_a_lone_surrogate_becomes_a_question_mark(tmp_path: Path) -> None:
    data = opened('{"text": "a\\ud800b", "label": 1}\n', tmp_path)
    assert data.splits["train"].read([0]).inputs == ["a?b"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\0\1\2" * 500, "no file of a known kind"),
        (b"\x93NUMPY\1\0v\0", "single array"),
        (b"PAR1" + bytes(50), "Parquet"),
        (b"\x89PNG\r\n\x1a\n", "single picture"),
        (b"%PDF-1.7\n", "PDF"),
        (b"<html><body>404</body>", "web page"),
        (b"\x80\x04\x95" + bytes(20), "pickle"),
        (b"PK\3\4" + bytes(40), "cut short"),
    ],
)
def test_what_is_no_dataset_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(DatasetRejected, match=words) as caught:
        opened(content, tmp_path, "data.bin")
    assert "A dataset is" in caught.value.detail
