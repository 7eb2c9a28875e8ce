"""Uniform grids of whole numbers: w = (q - z) s, a step s and a zero point z for each group of neighbouring weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SHRINKS = 40  # ranges that are tried
LEAST_SHRINK = 0.4  # the narrowest, as a share of the whole
# Behind the comma of such a number its dtype has no room; around it are whole numbers.
_NO_FRACTION = {torch.float32: 1.5 * 2.0**23, torch.float64: 1.5 * 2.0**52}


@dataclass(frozen=True)
class Grid:
    """Of groups [groups, size]: `step` [groups, 1], above zero, and `zero` [groups, 1], whole numbers as floats; codes
    are whole numbers from `low` to `high`."""

    step: Tensor
    zero: Tensor
    low: int
    high: int

    def codes(self, weights: Tensor) -> Tensor:
        """The nearest whole numbers, as floats, [groups, size] or a part of it."""
        return whole(torch.clamp(weights / self.step + self.zero, self.low, self.high))

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for; never -0.0."""
        return (codes - self.zero) * self.step + 0.0

    def rounded(self, weights: Tensor) -> Tensor:
        """The nearest values that there are."""
        return self.values(self.codes(weights))

    def held_in(self, dtype: torch.dtype) -> Grid:
        """With steps that a file of another floating dtype can hold."""
        step = self.step.to(dtype).to(self.step.dtype)
        return replace(self, step=torch.where((step > 0) & step.isfinite(), step, 1.0))


def whole(numbers: Tensor) -> Tensor:
    """The nearest whole numbers to ones of at most 2^22, in float32 or float64; of two that are as near the even one.

    torch.round gives the same, but splits as few as 2,048 numbers over threads, and each of the many small calls here
    then waits until the other cores are free: on a busy machine that took a hundred times as long.
    """
    large = _NO_FRACTION[numbers.dtype]
    return (numbers + large) - large


def limits(bits: int, symmetric: bool) -> tuple[int, int]:
    """The lowest and the highest code: signed where zero is the code 0, else unsigned."""
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if symmetric else (0, (1 << bits) - 1)


def whole_range(weights: Tensor, bits: int, symmetric: bool, share: Tensor | float = 1.0) -> Grid:
    """The grid over `share` of the range of each group [groups, size], zero included; zero itself is always on it."""
    low, high = limits(bits, symmetric)
    if symmetric:
        # One side has a code more, and takes the larger weights: the sign is with the step's side that has it.
        top = share * weights.abs().amax(1, keepdim=True)
        step = top / (high + 0.5)
        zero = torch.zeros_like(step)
    else:
        least = share * weights.amin(1, keepdim=True).clamp(max=0.0)
        most = share * weights.amax(1, keepdim=True).clamp(min=0.0)
        step = (most - least) / (high - low)
        zero = whole((-least / torch.where(step > 0, step, 1.0)).clamp(low, high))
    return Grid(torch.where(step > 0, step, 1.0), zero, low, high)


def least_squares(weights: Tensor, bits: int, symmetric: bool, importance: Tensor | None = None) -> Grid:
    """Of the ranges from all of a group's down to a share of it the one with the least squared error.

    Outliers are clipped where that makes the others finer. `importance` [groups, size] or [1, size] weighs the errors.
    """
    best = whole_range(weights, bits, symmetric)
    error = _error(best, weights, importance)
    step, zero = best.step.clone(), best.zero.clone()
    for share in torch.linspace(1.0, LEAST_SHRINK, SHRINKS)[1:].tolist():
        grid = whole_range(weights, bits, symmetric, share)
        own = _error(grid, weights, importance)
        better = own < error
        error = torch.where(better, own, error)
        step, zero = torch.where(better, grid.step, step), torch.where(better, grid.zero, zero)
    return Grid(step, zero, best.low, best.high)


def _error(grid: Grid, weights: Tensor, importance: Tensor | None) -> Tensor:
    """[groups, 1]."""
    errors = (grid.rounded(weights) - weights).square()
    return (errors if importance is None else errors * importance).sum(1, keepdim=True)
