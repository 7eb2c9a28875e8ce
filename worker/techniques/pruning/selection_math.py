"""Which of the scored go: exact counts, ties broken by position, no layer left empty.

What is scored are single weights or blocks of them; the lowest go. Every function takes the scores of the layers and
the masks so far, and says for each layer which are to be dropped (bool, of the scores' shape). What a mask holds at
zero goes first of all, so that a second pruning continues the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# A layer keeps at least this share of what pruning every layer alike would leave it. Global pruning may otherwise empty
# a layer and cut the network in two (layer collapse: Tanaka, Kunin, Yamins & Ganguli 2020). A tenth is far below what
# it leaves of a layer in practice, so the floor changes nothing but the collapse.
FLOOR_SHARE = 0.1


def removals(count: int, sparsity: float) -> int:
    """How many of `count` a sparsity removes: the nearest whole number."""
    return round(count * sparsity)


def floor(count: int, sparsity: float) -> int:
    """How many a layer of `count` keeps at least; 1 or more."""
    return max(1, math.ceil(FLOOR_SHARE * (1 - sparsity) * count))


def lowest_overall(scores: Sequence[Tensor], kept: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Drops the given share of all together, the lowest scores first.

    Raises ValueError where the layers' floors leave too few to remove.
    """
    rows = [_row(score, mask) for score, mask in zip(scores, kept, strict=True)]
    for row in rows:
        protected = min(floor(len(row), sparsity), int((row > -math.inf).count_nonzero()))
        row.masked_fill_(~_lowest(row, len(row) - protected), math.inf)
    dropped = _lowest(torch.cat(rows), removals(sum(map(len, rows)), sparsity))
    parts = dropped.split([len(row) for row in rows])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def lowest_each(scores: Sequence[Tensor], kept: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Drops that many of every layer, but leaves each at least one."""
    return [
        _lowest(_row(score, mask), min(count, score.numel() - 1)).view(score.shape)
        for score, mask, count in zip(scores, kept, counts, strict=True)
    ]


def lowest_of_groups(scores: Tensor, keep: int) -> Tensor:
    """Of each row of `scores` [groups, members] all but the `keep` highest; of equal ones the first stay."""
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :keep], False)


def below(weights: Sequence[Tensor], threshold: float) -> list[Tensor]:
    """Drops every weight with |w| < threshold."""
    return [weight.abs() < threshold for weight in weights]


def apportioned(counts: Sequence[int], sparsities: Sequence[float], total: int) -> list[int]:
    """How many each layer removes, as near to its sparsity as whole numbers are, together `total` (Hamilton's method).

    What the layers cannot remove, since each keeps one, is missing in the end.
    """
    exact = [count * sparsity for count, sparsity in zip(counts, sparsities, strict=True)]
    found = [min(math.floor(one), count - 1) for one, count in zip(exact, counts, strict=True)]
    order = sorted(range(len(counts)), key=lambda place: found[place] - exact[place])
    while (missing := total - sum(found)) > 0:
        open_ = [place for place in order if found[place] < counts[place] - 1]
        if not open_:
            break
        for place in open_[:missing]:
            found[place] += 1
    return found


def _row(scores: Tensor, kept: Tensor) -> Tensor:
    """Scores as one float32 row; -inf for what is pruned already, so that it goes before whatever is not."""
    return torch.where(kept, scores.detach().float(), -math.inf).flatten()


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Exactly `count` of the lowest scores; of equal ones the first."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = _kth(scores, count)
    if limit == math.inf:
        raise ValueError(f"{count} of {len(scores)} cannot go without emptying a layer")
    dropped = scores < limit
    ties = (scores == limit).nonzero().flatten()
    dropped[ties[: count - int(dropped.count_nonzero())]] = True
    return dropped


def _kth(scores: Tensor, k: int) -> float:
    """The k-th lowest score (k from 1), NaN last. NumPy's vectorized selection takes a tenth of `Tensor.kthvalue`."""
    return float(np.partition(scores.cpu().numpy(), k - 1)[k - 1])
