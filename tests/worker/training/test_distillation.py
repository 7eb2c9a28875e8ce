"""The distillation loss against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from worker.data.batch import Batch
from worker.objectives.classification import Classification
from worker.training.distillation import combined

RANDOM = np.random.default_rng(0)
STUDENT = RANDOM.normal(size=(5, 4)) * 3
TEACHER = RANDOM.normal(size=(5, 4)) * 3
TARGETS = np.array([0, 3, 1, 1, 2])


def by_scipy(temperature: float, alpha: float) -> float:
    soft = entropy(softmax(TEACHER / temperature, axis=1), softmax(STUDENT / temperature, axis=1), axis=1).mean()
    hard = -log_softmax(STUDENT, axis=1)[np.arange(5), TARGETS].mean()
    return float(alpha * temperature**2 * soft + (1 - alpha) * hard)


def ours(temperature: float, alpha: float, student: torch.Tensor) -> torch.Tensor:
    batch, task = Batch((student,), torch.tensor(TARGETS)), Classification()
    said = task.divergence(student, torch.tensor(TEACHER), batch, temperature)
    return combined(task, student, said, batch, alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_the_loss_is_hintons(temperature: float, alpha: float) -> None:
    assert ours(temperature, alpha, torch.tensor(STUDENT)).item() == pytest.approx(by_scipy(temperature, alpha))


def test_the_gradient_is_that_of_the_formula() -> None:
    student = torch.tensor(STUDENT, requires_grad=True)
    ours(4.0, 0.7, student).backward()
    # d/dz of T^2 KL is T (p_student - p_teacher); of the cross-entropy it is p_student - one_hot.
    soft = 4.0 * (softmax(STUDENT / 4.0, axis=1) - softmax(TEACHER / 4.0, axis=1))
    hard = softmax(STUDENT, axis=1) - np.eye(4)[TARGETS]
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), (0.7 * soft + 0.3 * hard) / 5)


def test_a_student_that_answers_like_its_teacher_has_nothing_to_learn_from_it() -> None:
    assert ours(4.0, 1.0, torch.tensor(TEACHER)).item() == pytest.approx(0.0, abs=1e-12)
