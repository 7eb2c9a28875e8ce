"""The seeded split: every row once, the same by the same seed, each class in its share; and when one is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.contract.facts import made_splits
from tests.worker.data.files import jsonl, opened
from tests.worker.data.test_arrays import npz
from worker.data.splits import divide, split_of_file

COUNTS = st.integers(10, 400)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(COUNTS, st.integers(0, 30), st.floats(0, 0.9), st.floats(0, 0.9), st.integers(0, 5))
def test_every_row_comes_once(count: int, classes: int, validation: float, test: float, seed: int) -> None:
    validation, test = validation / 2, test / 2
    labels = np.random.default_rng(seed).integers(0, classes, count) if classes else None
    parts = divide(count, labels, validation, test, seed)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(count))
    assert len(parts["train"]) >= 1
    for name, share in (("validation", validation), ("test", test)):
        assert abs(len(parts[name]) - count * share) <= 1
        assert (len(parts[name]) > 0) == (share > 0)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(0, 5))
def test_each_class_is_held_out_in_its_share(sizes: list[int], seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)) * 7 - 3, sizes)
    labels = labels[np.random.default_rng(seed).permutation(len(labels))]
    if len(labels) < 10 * len(sizes):
        return  # with few samples a class, keeping one of each in train outweighs the shares
    parts = divide(len(labels), labels, 0.1, 0.1, seed)
    for place, size in enumerate(sizes):
        number = place * 7 - 3
        held = sum(int((labels[parts[name]] == number).sum()) for name in ("validation", "test"))
        # One sample of each class is not drawn, so that the others are drawn a little more often.
        share = 0.2 * len(labels) / (len(labels) - len(sizes))
        assert abs(held - (size - 1) * share) <= 2
        assert (labels[parts["train"]] == number).any()


def test_classes_of_equal_size_are_cut_exactly() -> None:
    labels = np.arange(1000) % 10
    parts = divide(1000, labels, 0.1, 0.2, 0)
    assert {name: np.bincount(labels[rows]).tolist() for name, rows in parts.items()} == {
        "train": [70] * 10,
        "validation": [10] * 10,
        "test": [20] * 10,
    }


def test_the_seed_decides() -> None:
    one, same, other = (divide(100, None, 0.1, 0.1, seed)["test"].tolist() for seed in (0, 0, 1))
    assert one == same != other
    # The rows themselves: jobs of today and of next year have to be cut alike.
    assert one == [15, 27, 30, 48, 50, 65, 69, 85, 93, 96]


def test_as_many_classes_as_samples() -> None:
    assert {name: len(rows) for name, rows in divide(10, np.arange(10), 0.1, 0.1, 0).items()} == {
        "train": 8,
        "validation": 1,
        "test": 1,
    }


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("data/train-00000-of-00012.parquet", "train"),
        ("test_0003.tar.gz", "test"),
        ("val-0.tar", "validation"),
        ("dev1.txt", "validation"),
        ("calibration", "calibration"),
        ("training.jsonl", None),
        ("validation_matched-00000-of-00001.parquet", None),
        ("train/shard-0001.tar", None),
        ("Test.csv", None),
        ("", None),
    ],
)
def test_the_name_of_a_file_says_its_split(name: str, split: str | None) -> None:
    assert split_of_file(name) == split


ROWS = [{"text": f"t{number}", "label": "ab"[number % 2]} for number in range(20)]


def test_one_split_becomes_three(tmp_path: Path) -> None:
    data = opened(jsonl(*ROWS), tmp_path)
    assert {name: (s.samples, s.made_from) for name, s in data.facts.splits.items()} == {
        "train": (16, "train"),
        "validation": (2, "train"),
        "test": (2, "train"),
    }
    assert data.facts.split_seed == 0
    read = {name: split.read(range(len(split))) for name, split in data.splits.items()}
    together = sorted(text for batch in read.values() for text in batch.inputs)  # type: ignore[type-var]
    assert together == sorted(row["text"] for row in ROWS)
    for batch in read.values():
        numbers = [int(text[1:]) % 2 for text in batch.inputs]  # type: ignore[index]
        assert batch.targets.tolist() == numbers  # type: ignore[union-attr]
    assert all(sorted(read[name].targets.tolist()) == [0, 1] for name in ("validation", "test"))  # type: ignore[union-attr]
    again = opened(jsonl(*ROWS), tmp_path)
    assert again.splits["test"].read([0, 1]).inputs == data.splits["test"].read([0, 1]).inputs


def test_the_report_says_so(tmp_path: Path) -> None:
    said = made_splits(opened(jsonl(*ROWS), tmp_path, spec={"split": {"seed": 7}}).facts)
    assert said is not None
    for words in (
        "only the split train",
        "train (16), validation (2) and test (2)",
        "seed 7",
        "each class in its share",
    ):
        assert words in said
    unlabelled = made_splits(opened(jsonl(*({"text": row["text"]} for row in ROWS)), tmp_path).facts)
    assert unlabelled is not None
    assert "class" not in unlabelled
    assert made_splits(opened(jsonl(*ROWS), tmp_path, spec={"split": False}).facts) is None
    assert made_splits(None) is None


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        ({"split": False}, {"train": 20}),
        ({"split": {"validation": 0.25}}, {"train": 13, "validation": 5, "test": 2}),
        ({"split": {"validation": 0, "test": 0.5}}, {"train": 10, "test": 10}),
        ({"split": {"validation": 0, "test": 0}}, {"train": 20}),
    ],
)
def test_a_client_chooses_shares_or_none(tmp_path: Path, spec: dict[str, Any], sizes: dict[str, int]) -> None:
    facts = opened(jsonl(*ROWS), tmp_path, spec=spec).facts
    assert {name: split.samples for name, split in facts.splits.items()} == sizes


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("test.jsonl", ROWS),
        ("calibration.jsonl", ROWS),
        ("val.jsonl", ROWS),
        ("data.jsonl", ROWS[:9]),
        ("data.jsonl", [*ROWS, ROWS[0] | {"split": "calibration"}]),
        ("data.jsonl", [*ROWS, ROWS[0] | {"split": "test"}]),
    ],
)
def test_other_splits_stay_as_they_are(tmp_path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    facts = opened(jsonl(*rows), tmp_path, name).facts
    assert all(split.made_from is None for split in facts.splits.values())
    assert sum(split.samples for split in facts.splits.values()) == len(rows)
    assert facts.split_seed is None


def test_arrays_are_cut_too(tmp_path: Path) -> None:
    inputs, targets = np.arange(60, dtype=np.float32).reshape(30, 2), np.repeat([0, 1, 5], 10)
    data = opened(npz(train_inputs=inputs, train_targets=targets), tmp_path)
    facts = data.facts.splits
    assert {name: split.samples for name, split in facts.items()} == {"train": 24, "validation": 3, "test": 3}
    batch = data.splits["test"].read([2, 0])
    rows = (batch.inputs["input"][:, 0] / 2).int()  # type: ignore[call-overload, index]
    assert batch.targets.tolist() == targets[rows].tolist()  # type: ignore[union-attr]
    assert (facts["test"].target_min, facts["test"].target_max) == (0, 5)
