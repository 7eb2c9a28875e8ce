"""SparseGPT (Frantar & Alistarh 2023): weights go one column after the other, and those that stay make up for them.

What is kept low is the squared error of the layer's outputs, ||W X - W' X||^2, whose Hessian in each row of W is
H = X X^T (optimal brain surgeon: Hassibi & Stork 1993). One Cholesky factor of the inverse serves all rows. There a
column can only be made up for by those behind it; once it is known which weights go, all that stay are brought nearer
to the optimum by conjugate gradients (as in ALPS: Meng et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from worker.techniques.pruning.selection_math import lowest_each, lowest_of_groups, removals
from worker.threads import with_threads

BLOCK = 128  # columns whose weights are chosen together, and applied to the columns behind them at once
DAMPING = 0.01  # of the mean of the diagonal, added to it: H has the rank of the samples at most
REFINEMENTS = 30  # steps of conjugate gradients; what is left to gain after them is small beside what went


def pruned(
    weight: Tensor, moments: Tensor, kept: Tensor, sparsity: float | None, groups: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """The adjusted weight [outputs, columns] and what is dropped of it (bool).

    `moments` [columns, columns] is X X^T; `kept` the mask so far. Either a `sparsity`, met exactly over the matrix, or
    `groups` (n, m): of every m neighbouring columns n stay. Raises torch.linalg.LinAlgError where the moments are not
    finite.
    """
    weight = weight.float().clone()
    weight[:, moments.diagonal() == 0] = 0  # what never comes in needs no weight
    before = weight.clone()
    hessian = damped(moments)
    factor = inverse_factor(hessian)
    dropped = torch.zeros_like(weight, dtype=torch.bool)
    size = BLOCK if groups is None else BLOCK // groups[1] * groups[1] or groups[1]
    for start in range(0, weight.shape[1], size):
        end = min(start + size, weight.shape[1])
        if groups is None:
            assert sparsity is not None
            count = removals(end * len(weight), sparsity) - removals(start * len(weight), sparsity)
            scores = _scores(weight[:, start:end], factor, start)
            dropped[:, start:end] = lowest_each([scores], [kept[:, start:end]], [count])[0]
        with with_threads(1):
            errors = _remove(weight, kept, dropped, factor, slice(start, end), groups)
        weight[:, end:] -= errors @ factor[start:end, end:]
    return refined(before, weight.masked_fill(dropped, 0.0), hessian, ~dropped), dropped


def _remove(
    weight: Tensor, kept: Tensor, dropped: Tensor, factor: Tensor, block: slice, groups: tuple[int, int] | None
) -> Tensor:
    """Removes what goes of a block of columns, which make up for it; what those behind the block owe to each."""
    start, end = block.start, block.stop
    errors = torch.zeros_like(weight[:, block])
    for column in range(start, end):
        if groups is not None and (column - start) % groups[1] == 0:
            own = slice(column, column + groups[1])
            scores = _scores(weight[:, own], factor, column).masked_fill(~kept[:, own], -1)
            dropped[:, own] = lowest_of_groups(scores, groups[0])
        gone = torch.where(dropped[:, column], weight[:, column], 0.0) / factor[column, column]
        weight[:, column:end] -= gone.outer(factor[column, column:end])
        errors[:, column - start] = gone
    return errors


def damped(moments: Tensor) -> Tensor:
    """H + d I, d a share of the mean of its diagonal; 1 where an input never came."""
    hessian = moments.float().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    return hessian


def refined(target: Tensor, weight: Tensor, hessian: Tensor, kept: Tensor, steps: int = REFINEMENTS) -> Tensor:
    """Lowers tr((W - T) H (W - T)^T) over the weights that are kept, all rows of W [outputs, columns] at once.

    Conjugate gradients with the diagonal as preconditioner (Hestenes & Stiefel 1952); a step never makes a row worse.
    """
    found, diagonal = weight.clone(), hessian.diagonal()
    residual = torch.where(kept, (target - found) @ hessian, 0.0)
    scaled = residual / diagonal
    direction, power = scaled, (residual * scaled).sum(1, keepdim=True)
    for _ in range(steps):
        image = torch.where(kept, direction @ hessian, 0.0)
        curve = (direction * image).sum(1, keepdim=True)
        length = torch.where(curve > 0, power / curve, 0.0)
        found += length * direction
        residual = residual - length * image
        scaled = residual / diagonal
        following = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + torch.where(power > 0, following / power, 0.0) * direction
        power = following
    return found


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor U of the inverse, H^-1 = U^T U: row by row what a removed column asks of the columns
    behind it."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def _scores(weight: Tensor, factor: Tensor, start: int) -> Tensor:
    """w^2 / [H^-1]_jj: what the outputs lose with a weight, those in front of it being settled."""
    diagonal = factor.diagonal()[start : start + weight.shape[1]]
    return (weight / diagonal).square()
