"""GPTQ (Frantar, Ashkboos, Hoefler & Alistarh 2023): columns are rounded one after the other, and those behind a column
make up for what its rounding does to the outputs.

What is kept low is ||W X - W' X||^2, with H = X X^T as in SparseGPT; grids are fitted group by group to what the
columns have become when it is their turn. Rounding front to back leaves each column as the ones behind it found it;
sweeps of coordinate descent then look at every column again with all others settled (QuantEase: Behdin et al. 2023).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from worker.techniques.pruning.sparsegpt_math import damped, inverse_factor
from worker.techniques.quantization.grid_math import Grid, least_squares
from worker.techniques.quantization.groups import AT_ONCE
from worker.threads import with_threads

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
    # Columns lie side by side from here on, each with all outputs: they are worked on one at a time.
    kept = kept.T.contiguous()
    target = torch.where(kept, weight.float().T, 0.0)
    hessian = damped(moments)
    factor = inverse_factor(hessian)
    left, codes, grids = target.clone(), torch.zeros_like(target), []
    importance = hessian.diagonal()
    for start in range(0, len(target), group):
        end = min(start + group, len(target))
        own = left[start:end].T.contiguous()
        grid = _fitted(own, bits, symmetric, importance[start:end].unsqueeze(0)).held_in(dtype)
        grids.append(grid)
        _round(left, codes, kept, factor, _turned(grid), start, end)
    turned = [_turned(grid) for grid in grids]
    for _ in range(SWEEPS):
        _sweep(target, codes, kept, hessian, turned, group)
    return codes.T.contiguous(), grids


def _fitted(groups: Tensor, bits: int, symmetric: bool, importance: Tensor) -> Grid:
    """Grids of groups [outputs, columns], so many at a time as fit the cache."""
    parts = groups.split(max(1, AT_ONCE // groups.shape[1]))
    grids = [least_squares(part, bits, symmetric, importance) for part in parts]
    step, zero = torch.cat([grid.step for grid in grids]), torch.cat([grid.zero for grid in grids])
    return replace(grids[0], step=step, zero=zero)


def values(codes: Tensor, grids: list[Grid], group: int) -> Tensor:
    """What codes [outputs, columns] stand for."""
    return torch.cat([grid.values(own) for grid, own in zip(grids, codes.split(group, 1), strict=True)], 1)


def _turned(grid: Grid) -> Grid:
    """For weights [columns, outputs]."""
    return replace(grid, step=grid.step.T.contiguous(), zero=grid.zero.T.contiguous())


def _round(left: Tensor, codes: Tensor, kept: Tensor, factor: Tensor, grid: Grid, start: int, end: int) -> None:
    """Rounds the columns of a group, and passes on their errors."""
    for first in range(start, end, BLOCK):
        last = min(first + BLOCK, end)
        errors = left.new_zeros(last - first, left.shape[1])
        with with_threads(1):
            for column in range(first, last):
                own = left[column : column + 1]
                codes[column] = _codes(grid, own, kept[column])
                error = (own - grid.values(codes[column])) / factor[column, column]
                left[column:last] -= factor[column, column:last, None] * error
                errors[column - first] = error
        left[last:] -= factor[first:last, last:].T @ errors


def _sweep(target: Tensor, codes: Tensor, kept: Tensor, hessian: Tensor, grids: list[Grid], group: int) -> None:
    """Each column to the code that is best with all others as they are: w_j + [H (T - W)]_j / H_jj, rounded."""
    parts = zip(grids, codes.split(group), strict=True)
    found = torch.cat([grid.values(own) for grid, own in parts])
    gradient = hessian @ (target - found)
    for first in range(0, len(target), BLOCK):
        last = min(first + BLOCK, len(target))
        before = found[first:last].clone()
        with with_threads(1):
            for column in range(first, last):
                grid = grids[column // group]
                best = found[column] + gradient[column] / hessian[column, column]
                codes[column] = _codes(grid, best, kept[column])
                moved = grid.values(codes[column]) - found[column]
                found[column] += moved.squeeze(0)
                gradient[first:last] -= hessian[first:last, column, None] * moved
        moves = found[first:last] - before
        gradient[:first] -= hessian[:first, first:last] @ moves
        gradient[last:] -= hessian[last:, first:last] @ moves


def _codes(grid: Grid, weights: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, grid.codes(weights), grid.codes(torch.zeros_like(weights)))
