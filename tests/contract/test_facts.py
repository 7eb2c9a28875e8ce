"""Names of splits, and what a report says of splits that were made."""

from __future__ import annotations

import pytest

from app.contract.facts import SPLITS, made_splits, split_named
from tests.contract.facts import dataset_facts, split_facts


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_is_called_by_its_name(name: str) -> None:
    assert split_named(name) == name


@pytest.mark.parametrize(
    ("name", "split"),
    [("val", "validation"), ("valid", "validation"), ("dev", "validation"), ("eval", "validation")]
    + [(name, None) for name in ("", "Train", "training", "holdout", "tests")],
)
def test_other_names(name: str, split: str | None) -> None:
    assert split_named(name) == split


def test_nothing_is_said_of_uploaded_splits() -> None:
    assert made_splits(dataset_facts()) is None
    assert made_splits(None) is None


def test_made_splits_are_named_with_their_sizes_and_seed() -> None:
    splits = {name: split_facts(samples=size, made_from="train") for name, size in (("train", 8000), ("test", 2000))}
    assert made_splits(dataset_facts(splits=splits, split_seed=3)) == (
        "The dataset has only the split train: train (8,000) and test (2,000) were made of it at random with seed 3, "
        "each class in its share. Upload splits of your own to compare with other figures."
    )
