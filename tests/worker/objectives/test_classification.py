"""Accuracy counts what the targets say, over any runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from app.contract.errors import DatasetMismatch
from tests.worker.helpers import MemorySplit, memory_data, score, tiny_model
from worker.data.base import Data
from worker.data.feed import Feed

LOGITS = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1], [0.0, 0.2, 0.7], [0.3, 0.4, 0.2], [float("nan"), 0.0, 0.0]])
TARGETS = torch.tensor([1, 0, 2, 0, 0])  # three right, one wrong, and a NaN that argmax would call right


def feed(targets: torch.Tensor | None = TARGETS) -> Feed:
    """Samples that are their own logits."""
    model = tiny_model(torch.nn.Linear(3, 3), shape=(3,), classes=3)
    return Feed(model, memory_data({"test": (LOGITS, targets)}))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_the_share_of_right_answers_whatever_the_batches(batch_size: int) -> None:
    assert score(feed().task, lambda inputs: inputs[0], feed().batches("test", batch_size)) == (3 / 5, 5)


def test_a_runtime_that_returns_arrays_counts_alike() -> None:
    assert feed().score(lambda inputs: np.asarray(inputs[0]), "test") == (3 / 5, 5)


def test_a_split_without_targets_is_refused() -> None:
    with pytest.raises(DatasetMismatch, match="no"):
        feed(None).score(lambda inputs: inputs[0], "test")


def test_no_samples_give_no_accuracy() -> None:
    model = tiny_model(torch.nn.Linear(3, 3), shape=(3,), classes=3)
    full = memory_data({"test": (LOGITS, TARGETS)})
    data = Data(full.facts, {"test": MemorySplit(LOGITS[:0], TARGETS[:0])})
    with pytest.raises(DatasetMismatch, match="empty"):
        Feed(model, data).score(lambda inputs: inputs[0], "test")
