"""Half-quadratic quantization (HQQ: Badri & Shaji 2023): zero points that fit most weights well, without any data.

What is lowered is sum |w - w'|^p with p < 1, which forgives outliers. Split in two: an error e that may be anything,
sum |e|^p + b/2 |e - (w - w')|^2, is found in turns with the zero points, and b grows. Zero itself is then on no
grid, so that groups with a weight that is zero, as pruned ones are, keep a whole zero point.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from worker.techniques.quantization.grid_math import Grid, least_squares, whole_range

NORM = 0.7  # p
STRENGTH = 10.0  # b at first, for errors in steps of the grid
GROWTH = 1.01  # of b, in each turn
TURNS = 20


def fitted(weights: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Grid:
    """The grid of each group [groups, size], with zero points that are no whole numbers: w = (q - z) s.

    Steps are such as `dtype` has. A group with a zero among its weights has the grid of least squares.
    """
    grid = whole_range(weights, bits, symmetric=False).held_in(dtype)
    best, least, strength = grid, _loss(grid, weights), STRENGTH
    for _ in range(TURNS):
        codes = grid.codes(weights)
        error = shrunk((weights - grid.values(codes)) / grid.step, strength) * grid.step
        grid = replace(grid, zero=(codes - (weights - error) / grid.step).mean(1, keepdim=True))
        own = _loss(grid, weights)
        best = replace(best, zero=torch.where(own < least, grid.zero, best.zero))
        least = torch.minimum(least, own)
        strength *= GROWTH
    whole = least_squares(weights, bits, symmetric=False).held_in(dtype)
    with_zero = (weights == 0).any(1, keepdim=True)
    step, zero = (torch.where(with_zero, getattr(whole, part), getattr(best, part)) for part in ("step", "zero"))
    return replace(best, step=step, zero=zero)


def shrunk(values: Tensor, strength: float, norm: float = NORM) -> Tensor:
    """Nearly the e that lowers |e|^p + b/2 (e - v)^2: generalized soft thresholding (Chartrand 2012), elementwise."""
    size = values.abs()
    return values.sign() * (size - size.clamp(min=1e-8).pow(norm - 1) / strength).clamp(min=0.0)


def _loss(grid: Grid, weights: Tensor) -> Tensor:
    """sum |w - w'|^p of each group, [groups, 1]."""
    return (grid.rounded(weights) - weights).abs().pow(NORM).sum(1, keepdim=True)
