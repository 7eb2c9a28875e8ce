"""Sparsities layer by layer that meet one sparsity together."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

PRECISION = 1e-12
HALVINGS = 200  # more than float64 has bits


def erk(shapes: Sequence[tuple[int, ...]], sparsity: float) -> list[float]:
    """Erdos-Renyi-Kernel (Mocanu et al. 2018; Evci et al. 2020): densities in proportion to the sum of a weight's sides
    over their product, so that small layers stay denser; none above 1. Their mean over all weights is 1 - `sparsity`.
    """
    counts = np.array([prod(shape) for shape in shapes], float)
    raw = np.array([sum(shape) / prod(shape) for shape in shapes])
    dense = np.zeros(len(shapes), bool)
    wanted = (1 - sparsity) * counts.sum()
    while True:
        scale = (wanted - counts[dense].sum()) / max((raw * counts)[~dense].sum(), PRECISION)
        beyond = ~dense & (scale * raw > 1)
        if not beyond.any():
            return [0.0 if full else float(1 - scale * one) for full, one in zip(dense, raw, strict=True)]
        dense |= beyond


def allotted(
    counts: Sequence[int], levels: Sequence[float], losses: Sequence[Sequence[float]], sparsity: float
) -> list[float]:
    """The sparsities of least total loss of those that remove `sparsity` of all weights together.

    `losses[l][k]` is by how much the loss grows where layer l alone is pruned to `levels[k]` (ascending, below 1); at 0
    it grows by nothing. Between levels it is taken to be linear, and convex over them: with that the marginal loss of a
    weight is equal in all layers at the optimum (Lagrange; Everett 1963), and is found by halving.
    """
    grid = np.concatenate([[0.0], np.asarray(levels, float)])
    sizes = np.asarray(counts, float)
    hulls = [_convex(grid, np.concatenate([[0.0], np.asarray(own, float)])) for own in losses]
    wanted = sparsity * sizes.sum()
    steep = [np.diff(own) / np.diff(grid) / size for own, size in zip(hulls, sizes, strict=True)]
    low, high = -1.0, float(max(slope.max() for slope in steep)) + 1.0
    for _ in range(HALVINGS):
        price = (low + high) / 2
        reached = sum(size * grid[int((slope <= price).sum())] for size, slope in zip(sizes, steep, strict=True))
        low, high = (price, high) if reached < wanted else (low, price)
    below = np.array([grid[int((slope <= low).sum())] for slope in steep])
    above = np.array([grid[int((slope <= high).sum())] for slope in steep])
    if (sizes * above).sum() < wanted:  # beyond the levels: all alike
        share = (wanted - (sizes * above).sum()) / (sizes * (1 - above)).sum()
        return [float(one + share * (1 - one)) for one in above]
    room = (sizes * (above - below)).sum()
    share = (wanted - (sizes * below).sum()) / room if room > 0 else 0.0
    return [float(one + share * (other - one)) for one, other in zip(below, above, strict=True)]


def _convex(grid: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The greatest convex function that rises and lies below the points, at the points' places."""
    rising = np.maximum.accumulate(np.maximum(losses, 0.0))
    hull = [0]
    for place in range(1, len(grid)):
        while len(hull) > 1 and _above(grid, rising, hull[-2], hull[-1], place):
            hull.pop()
        hull.append(place)
    found: np.ndarray = np.interp(grid, grid[hull], rising[hull])
    return found


def _above(grid: np.ndarray, losses: np.ndarray, first: int, middle: int, last: int) -> bool:
    """Whether the middle point lies on or above the line of the others."""
    share = (grid[middle] - grid[first]) / (grid[last] - grid[first])
    return bool(losses[middle] >= losses[first] + share * (losses[last] - losses[first]))
