"""Grids against what they are by definition, and against a search of all that there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from worker.techniques.quantization import grid_math, hqq_math
from worker.techniques.quantization.grid_math import Grid


def groups(count: int = 40, size: int = 32, seed: int = 0) -> Tensor:
    """Normal weights, some groups far from zero, some with an outlier."""
    made = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    made[::3] += 0.7
    made[::5, 0] = 6.0
    return made


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_weight_comes_within_half_a_step_of_where_it_was(bits: int, symmetric: bool) -> None:
    weights = groups()
    grid = grid_math.whole_range(weights, bits, symmetric)
    codes = grid.codes(weights)
    assert torch.equal(codes, codes.round())
    assert (int(codes.min()), int(codes.max())) >= (grid.low, grid.low)
    assert grid.high - grid.low == 2**bits - 1
    off = (grid.values(codes) - weights).abs() / grid.step
    assert float(off.max()) <= 0.5 + 1e-4 if symmetric else 1.0  # a zero point is rounded too


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_on_every_grid_and_is_no_negative_zero(symmetric: bool) -> None:
    weights = torch.cat([groups(), torch.zeros(1, 32), torch.full((1, 32), -3.0), torch.full((1, 32), 2.0)])
    for grid in (
        grid_math.whole_range(weights, 4, symmetric),
        grid_math.least_squares(weights, 4, symmetric),
    ):
        zeros = grid.rounded(torch.full_like(weights, -0.0))
        assert not zeros.any()
        assert not torch.signbit(zeros).any()
        assert torch.isfinite(grid.rounded(weights)).all()


def test_whole_numbers_are_those_of_numpy() -> None:
    halves = np.arange(-4095.5, 4096, 0.5, dtype=np.float32)
    drawn = np.random.default_rng(0).uniform(-(2**22), 2**22, 100_000).astype(np.float32)
    for given in (halves, drawn, np.nextafter(halves, np.float32(np.inf)), np.nextafter(halves, np.float32(-np.inf))):
        np.testing.assert_array_equal(grid_math.whole(torch.from_numpy(given)).numpy(), np.rint(given))


def test_a_grid_by_hand() -> None:
    """-1 to 2 in four codes: a step of 1, and zero is the code 1."""
    grid = grid_math.whole_range(torch.tensor([[-1.0, 0.4, 2.0]]), 2, symmetric=False)
    assert (float(grid.step), float(grid.zero), grid.low, grid.high) == (1.0, 1.0, 0, 3)
    assert grid.codes(torch.tensor([[-1.0, 0.4, 0.6, 2.0, 9.0]])).tolist() == [[0.0, 1.0, 2.0, 3.0, 3.0]]
    assert grid.rounded(torch.tensor([[-1.0, 0.4, 0.6, 2.0, 9.0]])).tolist() == [[-1.0, 0.0, 1.0, 2.0, 2.0]]


def squared(grid: Grid, weights: Tensor) -> Tensor:
    return (grid.rounded(weights) - weights).square().sum(1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_least_squares_is_the_best_of_the_ranges(symmetric: bool) -> None:
    """NumPy looks at each group and range by itself."""
    weights = groups()
    found = squared(grid_math.least_squares(weights, 3, symmetric), weights)
    shares = np.linspace(1, grid_math.LEAST_SHRINK, grid_math.SHRINKS)
    for row, own in zip(weights.numpy().astype(np.float64), found.tolist(), strict=True):
        assert own == pytest.approx(min(_error(row, share, symmetric) for share in shares), rel=1e-3)
    assert float(found.sum()) < 0.95 * float(squared(grid_math.whole_range(weights, 3, symmetric), weights).sum())


def _error(row: np.ndarray, share: float, symmetric: bool) -> float:
    if symmetric:
        step, zero, low, high = share * abs(row).max() / 3.5, 0.0, -4, 3
    else:
        step, low, high = share * (max(row.max(), 0) - min(row.min(), 0)) / 7, 0, 7
        zero = np.clip(np.round(-share * min(row.min(), 0) / step), 0, 7)
    codes = np.clip(np.round(row / step + zero), low, high)
    return float(((step * (codes - zero) - row) ** 2).sum())


def test_errors_that_matter_more_are_smaller() -> None:
    weights = groups(seed=1)
    importance = torch.ones_like(weights)
    importance[:, :4] = 100.0
    plain = grid_math.least_squares(weights, 2, symmetric=False).rounded(weights)
    weighed = grid_math.least_squares(weights, 2, symmetric=False, importance=importance).rounded(weights)
    first = (slice(None), slice(4))
    assert float((weighed - weights)[first].square().sum()) < float((plain - weights)[first].square().sum())


def test_soft_thresholds_lower_what_they_are_to_lower() -> None:
    """|e|^p + b/2 (e - v)^2, against a search over e."""
    strength, norm = 10.0, 0.7
    for value in (-3.0, -0.05, 0.2, 0.9):
        tried = torch.linspace(-4, 4, 80_001)
        losses = tried.abs().pow(norm) + strength / 2 * (tried - value) ** 2
        found = hqq_math.shrunk(torch.tensor([value]), strength, norm)
        own = found.abs().pow(norm) + strength / 2 * (found - value) ** 2
        assert float(own) <= 1.35 * float(losses.min()) + 1e-6


def test_hqq_fits_most_weights_better_than_their_range_does() -> None:
    weights = groups(200, 64, 2) + 1e-6  # none of them is zero
    before = grid_math.whole_range(weights, 3, symmetric=False).rounded(weights)
    after = hqq_math.fitted(weights, 3).rounded(weights)
    lost = [(one - weights).abs().pow(hqq_math.NORM).sum(1) for one in (before, after)]
    assert bool((lost[1] <= lost[0]).all())
    assert float(lost[1].sum()) < 0.95 * float(lost[0].sum())


def test_hqq_keeps_zeros() -> None:
    weights = groups(50, 64, 3)
    weights[::2, 5] = 0.0
    grid = hqq_math.fitted(weights, 3)
    assert not grid.rounded(weights)[::2, 5].any()
    assert torch.equal(grid.zero[::2], grid.zero[::2].round())
    assert not torch.equal(grid.zero[1::2], grid.zero[1::2].round())
