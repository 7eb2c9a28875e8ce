"""Budgets by layer against formulas by hand and a solver of SciPy."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from scipy.optimize import linprog

from worker.techniques.pruning import budgets_math as maths


def test_erk_is_in_proportion_to_the_sides() -> None:
    shapes = [(300, 784), (100, 300), (10, 100)]
    found = maths.erk(shapes, 0.98)
    densities = [1 - sparsity for sparsity in found]
    raw = [1084 / 235_200, 400 / 30_000, 110 / 1000]
    scale = 0.02 * 266_200 / (1084 + 400 + 110)
    assert densities == pytest.approx([scale * one for one in raw])
    assert sum(prod(shape) * density for shape, density in zip(shapes, densities, strict=True)) == pytest.approx(5324)


def test_erk_leaves_no_layer_denser_than_dense() -> None:
    shapes = [(8, 1, 3, 3), (64, 64, 3, 3), (128, 64, 3, 3)]
    found = maths.erk(shapes, 0.5)
    assert found[0] == 0.0
    counts = [prod(shape) for shape in shapes]
    assert sum(n * s for n, s in zip(counts, found, strict=True)) == pytest.approx(0.5 * sum(counts))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.85])
def test_allotted_budgets_are_those_of_a_linear_programme(seed: int, sparsity: float) -> None:
    """With convex losses that are linear between levels, the optimum is that of a linear programme."""
    random = np.random.default_rng(seed)
    levels = [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99]
    counts = random.integers(10, 5000, 4)
    widths = np.diff([0.0, *levels])
    slopes = np.sort(random.exponential(size=(4, len(levels))), axis=1)
    losses = np.cumsum(slopes * widths, axis=1)
    found = maths.allotted(counts.tolist(), levels, losses.tolist(), sparsity)
    assert np.dot(found, counts) == pytest.approx(sparsity * counts.sum(), rel=1e-6)
    amounts = (np.repeat(counts[:, None], len(levels), 1)).ravel().astype(float)
    solved = linprog(
        slopes.ravel(),
        A_eq=[amounts],
        b_eq=[sparsity * counts.sum()],
        bounds=[(0, width) for _ in range(4) for width in widths],
    )
    loss = sum(np.interp(own, [0.0, *levels], [0.0, *row]) for own, row in zip(found, losses, strict=True))
    assert loss == pytest.approx(solved.fun, rel=1e-6)


def test_a_layer_that_nothing_depends_on_goes_first() -> None:
    levels = [0.5, 0.9]
    found = maths.allotted([1000, 1000], levels, [[0.0, 0.0], [1.0, 9.0]], 0.45)
    assert found == pytest.approx([0.9, 0.0])


def test_noise_that_falls_is_taken_for_nothing() -> None:
    found = maths.allotted([1000, 1000], [0.5, 0.9], [[-0.1, -0.2], [0.2, 0.1]], 0.7)
    assert np.mean(found) == pytest.approx(0.7)
    assert found[0] == pytest.approx(0.9)


def test_beyond_the_levels_all_are_pruned_alike() -> None:
    found = maths.allotted([1000, 3000], [0.5, 0.9], [[0.1, 0.2], [0.3, 0.4]], 0.95)
    assert found == pytest.approx([0.95, 0.95])
