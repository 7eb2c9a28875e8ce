"""Decoupled distillation and ensembles against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from worker.data.batch import IGNORED
from worker.training.distilling.logit_math import decoupled, mean_direction, mean_sigmoid, mean_softmax
from worker.training.losses import soft_targets

RANDOM = np.random.default_rng(0)
STUDENT = RANDOM.normal(size=(5, 4)) * 3
TEACHER = RANDOM.normal(size=(5, 4)) * 3
TARGETS = np.array([0, 3, 1, 1, 2])


def by_numpy(temperature: float, target: float, others: float) -> float:
    total = 0.0
    for s, t, y in zip(STUDENT, TEACHER, TARGETS, strict=True):
        p, q = softmax(t / temperature), softmax(s / temperature)
        tckd = p[y] * np.log(p[y] / q[y]) + (1 - p[y]) * np.log((1 - p[y]) / (1 - q[y]))
        rest_p, rest_q = np.delete(p, y) / (1 - p[y]), np.delete(q, y) / (1 - q[y])
        total += target * tckd + others * float(np.sum(rest_p * np.log(rest_p / rest_q)))
    return temperature**2 * total / len(TARGETS)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
@pytest.mark.parametrize(("target", "others"), [(1.0, 8.0), (0.0, 1.0), (1.0, 0.0)])
def test_decoupled_distillation_is_the_papers(temperature: float, target: float, others: float) -> None:
    found = decoupled(*map(torch.tensor, (STUDENT, TEACHER, TARGETS)), temperature, target, others)
    assert found.item() == pytest.approx(by_numpy(temperature, target, others))


def test_its_parts_sum_to_hintons_loss_with_the_share_of_the_others_as_weight() -> None:
    """Equation 7 of the paper: KD = TCKD + (1 - p_target) NCKD, here of a single sample."""
    student, teacher, target = (torch.tensor(array[:1]) for array in (STUDENT, TEACHER, TARGETS))
    others = 1 - torch.softmax(teacher, dim=-1)[0, int(target)].item()
    together = decoupled(student, teacher, target, 1.0, 1.0, others)
    assert together.item() == pytest.approx(soft_targets(student, teacher, 1.0).item())


def test_positions_that_do_not_count_are_left_out_and_gradients_are_finite() -> None:
    student = torch.tensor(STUDENT * 100, requires_grad=True)  # probabilities that underflow
    targets = torch.tensor([0, IGNORED, 1, 1, 2])
    loss = decoupled(student, torch.tensor(TEACHER), targets, 1.0, 1.0, 8.0)
    loss.backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
    assert bool((student.grad[1] == 0).all())
    assert bool((student.grad[0] != 0).any())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_an_ensemble_says_the_mean_of_softened_probabilities(temperature: float) -> None:
    together = mean_softmax([torch.tensor(STUDENT), torch.tensor(TEACHER)], temperature)
    expected = (softmax(STUDENT / temperature, axis=1) + softmax(TEACHER / temperature, axis=1)) / 2
    np.testing.assert_allclose(torch.softmax(together / temperature, dim=1).numpy(), expected)
    labels = mean_sigmoid([torch.tensor(STUDENT), torch.tensor(TEACHER)], temperature)
    expected = (expit(STUDENT / temperature) + expit(TEACHER / temperature)) / 2
    np.testing.assert_allclose(torch.sigmoid(labels / temperature).numpy(), expected)


def test_an_ensemble_of_one_says_what_it_says() -> None:
    alone = torch.tensor(TEACHER)
    np.testing.assert_allclose(torch.softmax(mean_softmax([alone], 2.0), 1), softmax(TEACHER, axis=1))
    np.testing.assert_allclose(mean_sigmoid([alone], 2.0), TEACHER)


def test_directions_are_averaged_without_their_lengths() -> None:
    found = mean_direction([torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.5]])])
    assert found.tolist() == [[0.5, 0.5]]
