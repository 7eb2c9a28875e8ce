"""GPTQ (Frantar, Ashkboos, Hoefler & Alistarh 2023): columns are rounded one after the other, and those behind a column
make up for what its rounding does to the outputs.

What is kept low is ||W X - W' X||^2, with H = X X^T as in SparseGPT; grids are fitted group by group to what the
columns have become when it is their turn. Rounding front to back leaves each column as the ones behind it found it;
sweeps of coordinate descent then look at every column again with all others settled (QuantEase: Behdin et al. 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from worker.techniques.pruning.sparsegpt_math import damped, inverse_factor
from worker.techniques.quantization.grid_math import Grid, least_squares

BLOCK = 128  # columns whose errors are applied to the columns behind them at once
SWEEPS = 4  # of coordinate descent; a fifth gains next to nothing


def quantized(
    weight: Tensor,
    moments: Tensor,
    kept: Tensor,
    bits: int,
    group: int,
    symmetric: bool,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, list[Grid]]:
    """The codes [outputs, columns] and a grid for each `group` columns, of [outputs, 1] steps and zero points.

    `moments` [columns, columns] is X X^T; `kept` (bool) are the weights that are not pruned, and the others get the
    code of zero. Steps are such as `dtype` has. Raises torch.linalg.LinAlgError where the moments are not finite.
    """
    target = torch.where(kept, weight.float(), 0.0)
    hessian = damped(moments)
    factor = inverse_factor(hessian)
    left, codes, grids = target.clone(), torch.zeros_like(target), []
    importance = hessian.diagonal()
    for start in range(0, target.shape[1], group):
        end = min(start + group, target.shape[1])
        grid = least_squares(left[:, start:end], bits, symmetric, importance[start:end].unsqueeze(0)).held_in(dtype)
        grids.append(grid)
        _round(left, codes, kept, factor, grid, start, end)
    for _ in range(SWEEPS):
        _sweep(target, codes, kept, hessian, grids, group)
    return codes, grids


def values(codes: Tensor, grids: list[Grid], group: int) -> Tensor:
    """What codes [outputs, columns] stand for."""
    return torch.cat([grid.values(own) for grid, own in zip(grids, codes.split(group, 1), strict=True)], 1)


def _round(left: Tensor, codes: Tensor, kept: Tensor, factor: Tensor, grid: Grid, start: int, end: int) -> None:
    """Rounds the columns of a group, and passes on their errors."""
    for first in range(start, end, BLOCK):
        last = min(first + BLOCK, end)
        errors = left.new_zeros(len(left), last - first)
        for column in range(first, last):
            own = left[:, column : column + 1]
            codes[:, column : column + 1] = _codes(grid, own, kept[:, column : column + 1])
            error = (own - grid.values(codes[:, column : column + 1])).squeeze(1) / factor[column, column]
            left[:, column:last] -= error.outer(factor[column, column:last])
            errors[:, column - first] = error
        left[:, last:] -= errors @ factor[first:last, last:]


def _sweep(target: Tensor, codes: Tensor, kept: Tensor, hessian: Tensor, grids: list[Grid], group: int) -> None:
    """Each column to the code that is best with all others as they are: w_j + [(T - W) H]_j / H_jj, rounded."""
    found = values(codes, grids, group)
    gradient = (target - found) @ hessian
    for column in range(target.shape[1]):
        grid = grids[column // group]
        own = found[:, column : column + 1]
        best = own + gradient[:, column : column + 1] / hessian[column, column]
        codes[:, column : column + 1] = _codes(grid, best, kept[:, column : column + 1])
        moved = grid.values(codes[:, column : column + 1]) - own
        found[:, column : column + 1] += moved
        gradient -= moved * hessian[column]


def _codes(grid: Grid, weights: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, grid.codes(weights), grid.codes(torch.zeros_like(weights)))
