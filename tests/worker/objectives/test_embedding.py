"""Vectors and their neighbours, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from app.contract.errors import Unsupported
from tests.worker.helpers import score
from worker.data.batch import Batch
from worker.metrics import kinds
from worker.objectives.embedding import SentenceEmbedding

RANDOM = np.random.default_rng(3)
CLASSES = RANDOM.integers(0, 3, size=40)
VECTORS = RANDOM.normal(size=(40, 6)) + 1.5 * np.eye(6)[CLASSES]


@pytest.mark.parametrize(("batch", "block"), [(7, 512), (40, 16)])
def test_neighbours_are_scikit_learns(batch: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "BLOCK", block)
    neighbour = KNeighborsClassifier(1, metric="cosine", algorithm="brute")
    wanted = cross_val_score(neighbour, VECTORS, CLASSES, cv=LeaveOneOut()).mean()
    parts = [
        Batch((torch.tensor(VECTORS[i : i + batch]),), torch.tensor(CLASSES[i : i + batch]))
        for i in range(0, 40, batch)
    ]
    value, samples = score(SentenceEmbedding(), lambda inputs: inputs[0], parts)
    assert value == pytest.approx(wanted)
    assert 0.4 < value < 1
    assert samples == 40


def test_a_student_is_judged_by_the_angle() -> None:
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    batch = Batch((student,), None)
    assert SentenceEmbedding().divergence(student, teacher, batch, 4.0).item() == pytest.approx((0 + 1) / 2)


def test_there_is_no_loss_without_a_teacher() -> None:
    with pytest.raises(Unsupported, match="distill"):
        SentenceEmbedding().loss(torch.zeros(2, 2), Batch((torch.zeros(2, 2),), torch.tensor([0, 1])))
