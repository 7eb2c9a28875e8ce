"""Losses on features against NumPy, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from worker.training.distilling import feature_math as math

RANDOM = np.random.default_rng(0)
STUDENT = RANDOM.normal(size=(5, 3))
TEACHER = RANDOM.normal(size=(5, 3)) * 4


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def pair(a: np.ndarray, b: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.tensor(a), torch.tensor(b)


def test_a_hint_is_the_mean_squared_error_over_what_counts() -> None:
    student, teacher = RANDOM.normal(size=(2, 3, 4)), RANDOM.normal(size=(2, 3, 4))
    assert math.hint(*pair(student, teacher)).item() == pytest.approx(np.mean((student - teacher) ** 2))
    counts = np.array([[True, True, False], [True, False, False]])
    expected = np.mean((student - teacher)[counts] ** 2)
    assert math.hint(*pair(student, teacher), torch.tensor(counts)).item() == pytest.approx(expected)


def test_attention_maps_are_unit_vectors_of_summed_squares() -> None:
    activations = RANDOM.normal(size=(2, 6, 3, 4))
    found = math.attention_map(torch.tensor(activations))
    assert found.shape == (2, 1, 3, 4)
    for got, sample in zip(found.flatten(1).numpy(), activations, strict=True):
        energy = (sample**2).sum(0).ravel()
        np.testing.assert_allclose(got, energy / np.sqrt((energy**2).sum()))


def test_attention_transfer_takes_squared_distances() -> None:
    student, teacher = RANDOM.normal(size=(2, 1, 2, 2)), RANDOM.normal(size=(2, 1, 2, 2))
    expected = np.mean([np.sum((s - t) ** 2) for s, t in zip(student, teacher, strict=True)])
    assert math.attention_transfer(*pair(student, teacher)).item() == pytest.approx(expected)


@pytest.mark.parametrize("heads", [2, 4])
def test_attention_probabilities_of_other_numbers_of_heads_are_averaged(heads: int) -> None:
    student, teacher = RANDOM.random((2, 2, 3, 3)), RANDOM.random((2, heads, 3, 3))
    counts = np.array([[True, True, False], [True, True, True]])
    error = (student - teacher) ** 2 if heads == 2 else (student.mean(1) - teacher.mean(1))[:, None] ** 2
    expected = error.mean(1)[counts].mean()
    found = math.attention_probabilities(*pair(student, teacher), torch.tensor(counts))
    assert found.item() == pytest.approx(expected)


def test_distances_relate_as_in_the_paper() -> None:
    def relations(x: np.ndarray) -> dict[tuple[int, int], float]:
        found = {(i, j): float(np.linalg.norm(x[i] - x[j])) for i, j in permutations(range(len(x)), 2)}
        mean = sum(found.values()) / len(found)
        return {key: value / mean for key, value in found.items()}

    ours, theirs = relations(STUDENT), relations(TEACHER)
    expected = np.mean([huber(ours[key] - theirs[key]) for key in ours])
    assert math.distance_relation(*pair(STUDENT, TEACHER)).item() == pytest.approx(expected)


def test_angles_relate_as_in_the_paper() -> None:
    def cosine(x: np.ndarray, i: int, j: int, k: int) -> float:
        a, b = x[j] - x[i], x[k] - x[i]
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    triples = list(permutations(range(len(STUDENT)), 3))
    expected = np.mean([huber(cosine(STUDENT, *t) - cosine(TEACHER, *t)) for t in triples])
    assert math.angle_relation(*pair(STUDENT, TEACHER)).item() == pytest.approx(expected)


def test_relations_do_not_change_with_scale_and_place() -> None:
    moved = torch.tensor(TEACHER)
    assert math.distance_relation(3 * moved + 7, moved).item() == pytest.approx(0, abs=1e-9)
    assert math.angle_relation(3 * moved + 7, moved).item() == pytest.approx(0, abs=1e-9)


def test_the_contrast_is_a_cross_entropy_over_the_batch() -> None:
    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    logits = unit(STUDENT) @ unit(TEACHER).T / 0.1
    expected = np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(logits)])
    assert math.contrast(*pair(STUDENT, TEACHER), 0.1).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [math.hint, math.distance_relation, math.angle_relation])
@pytest.mark.parametrize("samples", [1, 2, 4])
def test_equal_and_coinciding_samples_have_finite_gradients(
    loss: Callable[[Tensor, Tensor], Tensor], samples: int
) -> None:
    """A batch may hold one sample, or the same one twice."""
    student = torch.ones(samples, 3, requires_grad=True)
    value = loss(student, torch.ones(samples, 3))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
