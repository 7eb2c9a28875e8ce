"""Text as JSON Lines and CSV: rows by split, labels as numbers, faults by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

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
        "reviews/logo.svg": b"<svg/>",
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
        ("d.jsonl", '{"text": "a", "label": "' + "x" * 257 + '"}', "line 1 has a label of 257 characters"),
        ("d.jsonl", GOOD + '{"text": "a", "label": 1, "split": "holdout"}\n', "split 'holdout'"),
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
    with pytest.raises(DatasetRejected, match=r"'holdout\.jsonl'"):
        opened(zipped({"holdout.jsonl": GOOD.encode()}), tmp_path, "d.zip")


def test_a_file_and_a_field_may_use_other_names_of_validation(tmp_path: Path) -> None:
    data = opened(zipped({"train.jsonl": GOOD.encode(), "dev-00000.jsonl": GOOD.encode()}), tmp_path, "d.zip")
    assert list(data.splits) == ["train", "validation"]
    row = '{"text": "a", "label": 1, "split": "valid"}\n'
    assert list(opened(GOOD + row, tmp_path).splits) == ["train", "validation"]


def test_two_names_of_one_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetRejected, match="'dev' and 'eval' both mean the split 'validation'"):
        opened(zipped({"dev.jsonl": GOOD.encode(), "eval.jsonl": GOOD.encode()}), tmp_path, "d.zip")


def test_a_file_that_is_called_test_is_the_split_test(tmp_path: Path) -> None:
    assert list(opened(GOOD, tmp_path, "test.jsonl").splits) == ["test"]


def test_words_and_tags(tmp_path: Path) -> None:
    rows = [
        {"tokens": ["Ada", "lives", "in", "Rom"], "tags": ["PER", "O", "O", "LOC"]},
        {"tokens": ["Ja"], "tags": ["O"], "split": "test"},
        {"tokens": ["nul\0 \u20ac"], "split": "calibration"},
    ]
    data = opened(lines(*rows), tmp_path)
    assert (data.facts.kind, data.facts.labels) == ("tokens", ("LOC", "O", "PER"))
    train = data.facts.splits["train"]
    assert (train.targets, train.target_min, train.target_max) == ("tags", 0, 2)
    assert data.facts.splits["calibration"].targets is None
    batch = data.splits["train"].read([0])
    assert batch.inputs == [["Ada", "lives", "in", "Rom"]]
    assert isinstance(batch.targets, list)
    assert batch.targets[0].dtype == torch.int64
    assert batch.targets[0].tolist() == [2, 1, 1, 0]
    assert data.splits["calibration"].read([0]).inputs == [["nul\0 \u20ac"]]


def test_tags_that_are_numbers_stand_for_themselves_and_some_do_not_count(tmp_path: Path) -> None:
    data = opened(lines({"tokens": ["a", "b", "c"], "tags": [7, -100, 3]}), tmp_path)
    facts = data.facts.splits["train"]
    assert (data.facts.labels, facts.target_min, facts.target_max) == (None, 3, 7)
    assert data.splits["train"].read([0]).targets[0].tolist() == [7, -100, 3]  # type: ignore[index, union-attr]


def test_values(tmp_path: Path) -> None:
    data = opened(lines({"text": "a", "value": 0.5}, {"text": "b", "value": -2}), tmp_path)
    facts = data.facts.splits["train"]
    assert (facts.targets, facts.target_shape, facts.binary, facts.target_min) == ("values", (), False, None)
    targets = data.splits["train"].read([1, 0]).targets
    assert isinstance(targets, torch.Tensor)
    assert (targets.dtype, targets.tolist()) == (torch.float32, [-2.0, 0.5])


def test_values_in_csv_and_several_labels_at_once(tmp_path: Path) -> None:
    assert opened("text,value\na,1e-1\n", tmp_path, "d.csv").splits["train"].read([0]).targets.tolist() == [  # type: ignore[union-attr]
        pytest.approx(0.1)
    ]
    facts = opened(lines({"text": "a", "values": [1, 0]}, {"text": "b", "values": [0, 0]}), tmp_path).facts
    assert (facts.splits["train"].target_shape, facts.splits["train"].binary) == ((2,), True)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"tokens": ["a", "b"], "tags": [1]}], "line 1 has 2 tokens and 1 tags"),
        ([{"tokens": ["a"], "tags": 1}], "`tags` that are no list"),
        ([{"tokens": ["a"], "tags": [-3]}], "the tag -3"),
        ([{"tokens": ["a"], "tags": [1.5]}], "the label '1.5'"),
        ([{"tokens": ["a"], "label": 1}], "`tokens` and no `tags`"),
        ([{"tokens": []}], "no list of words"),
        ([{"tokens": [1]}], "no list of words"),
        ([{"tokens": "a b"}], "no list of words"),
        ([{"tokens": ["a"] * 70_000}], "70000 tokens"),
        ([{"text": "a"}, {"tokens": ["a"]}], "line 2 is tokens, and what came before is text"),
        ([{"text": "a", "label": 1, "value": 2}], "`label` and `value`: a sample has one target"),
        ([{"text": "a", "value": "high"}], "the value 'high'"),
        ([{"text": "a", "value": 10**400}], "the value '1000"),
        ([{"text": "a", "value": 1e300}], "what float32 cannot hold"),
        ([{"text": "a", "value": float("nan")}], "NaN"),
        ([{"text": "a", "values": []}], "no list of 1 to"),
        ([{"text": "a", "values": [1, 2]}, {"text": "b", "values": [1]}], "line 2 has 1 values"),
        ([{"text": "a", "values": [1, [2]]}], "the value"),
        ([{"text": "a", "value": 1}, {"text": "b", "label": 1}], "line 2 has classes as its target"),
        ([{"text": "a", "value": 1}, {"text": "b", "label": 1, "split": "test"}], "targets of different kinds"),
    ],
)
def test_faulty_targets_are_named_by_line(tmp_path: Path, rows: list[object], words: str) -> None:
    with pytest.raises(DatasetRejected, match=words):
        opened(lines(*rows), tmp_path)


def test_a_lone_surrogate_becomes_a_question_mark(tmp_path: Path) -> None:
    data = opened('{"text": "a\\ud800b", "label": 1}\n', tmp_path)
    assert data.splits["train"].read([0]).inputs == ["a?b"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\0\1\2" * 500, "no file of a known kind"),
        (b"\x93NUMPY\1\0v\0", "single array"),
        (b"ARROW1" + bytes(50), "Arrow"),
        (b"RIFF0000WAVEfmt ", "single sound"),
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
