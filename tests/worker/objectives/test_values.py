"""Regression and several labels at once, against NumPy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import entropy
from sklearn.metrics import f1_score

from app.contract.errors import DatasetMismatch
from tests.worker.helpers import score
from worker.data.batch import Batch
from worker.objectives.values import MultiLabel, Regression

RANDOM = np.random.default_rng(0)
OUTPUTS = RANDOM.normal(size=(7, 3))
TRUE = RANDOM.normal(size=(7, 3))
LABELS = RANDOM.integers(0, 2, size=(7, 3))


def batches(targets: np.ndarray, size: int) -> list[Batch]:
    """Batches whose input is the model's output."""
    return [
        Batch((torch.tensor(OUTPUTS[i : i + size]),), torch.tensor(targets[i : i + size])) for i in range(0, 7, size)
    ]


@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_mean_squared_error_whatever_the_batches(size: int) -> None:
    value, samples = score(Regression(), lambda inputs: inputs[0], batches(TRUE, size))
    assert value == pytest.approx(np.mean((OUTPUTS - TRUE) ** 2))
    assert samples == 7


def test_a_column_of_targets_is_not_broadcast() -> None:
    column = Batch((torch.zeros(4, 1),), torch.arange(4.0))
    assert score(Regression(), lambda inputs: inputs[0], [column]) == (pytest.approx((0 + 1 + 4 + 9) / 4), 4)
    with pytest.raises(DatasetMismatch, match=r"\[4, 2\]"):
        Regression().loss(torch.zeros(4, 2), column)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_f1_is_scikit_learns(size: int) -> None:
    value, samples = score(MultiLabel(), lambda inputs: inputs[0], batches(LABELS, size))
    assert value == pytest.approx(f1_score(LABELS, OUTPUTS > 0, average="micro"))
    assert samples == 7


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_of_labels_is_that_of_their_coins(temperature: float) -> None:
    student, teacher = expit(OUTPUTS / temperature), expit(TRUE / temperature)
    coins = entropy(np.stack((teacher, 1 - teacher)), np.stack((student, 1 - student)), axis=0)
    batch = batches(LABELS, 7)[0]
    ours = MultiLabel().divergence(torch.tensor(OUTPUTS), torch.tensor(TRUE), batch, temperature)
    assert ours.item() == pytest.approx(temperature**2 * coins.mean())
