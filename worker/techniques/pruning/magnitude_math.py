"""Which weights are the smallest: exact counts, ties broken by position, no layer left empty.

Magnitude pruning as in Han, Pool, Tran & Dally 2015. Every function takes the weights of the layers as they stand, and
says for each of them which are to be dropped (bool, of its shape). Weights that a mask holds at zero come first of all,
so that a second pruning continues the first.
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
    """How many of `count` weights a sparsity removes: the nearest whole number."""
    return round(count * sparsity)


def floor(count: int, sparsity: float) -> int:
    """How many weights a layer of `count` keeps at least; 1 or more."""
    return max(1, math.ceil(FLOOR_SHARE * (1 - sparsity) * count))


def smallest_overall(weights: Sequence[Tensor], kept: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Drops the given share of all weights together, the smallest magnitudes first.

    `kept` are the masks so far. Raises ValueError where the layers' floors leave too few to remove.
    """
    scores = [_scores(weight, mask) for weight, mask in zip(weights, kept, strict=True)]
    for score in scores:
        protected = min(floor(len(score), sparsity), int((score >= 0).count_nonzero()))
        score.masked_fill_(~_smallest(score, len(score) - protected), math.inf)
    dropped = _smallest(torch.cat(scores), removals(sum(map(len, scores)), sparsity))
    parts = dropped.split([len(score) for score in scores])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def smallest_each(weights: Sequence[Tensor], kept: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Drops the given share of every layer's weights, but leaves each at least one."""
    return [
        _smallest(_scores(weight, mask), min(removals(weight.numel(), sparsity), weight.numel() - 1)).view(weight.shape)
        for weight, mask in zip(weights, kept, strict=True)
    ]


def below(weights: Sequence[Tensor], threshold: float) -> list[Tensor]:
    """Drops every weight with |w| < threshold."""
    return [weight.abs() < threshold for weight in weights]


def _scores(weight: Tensor, kept: Tensor) -> Tensor:
    """Magnitudes as one float32 row; -1 for what is pruned already, so that it goes before a zero that is not."""
    return torch.where(kept, weight.detach().abs().float(), -1.0).flatten()


def _smallest(scores: Tensor, count: int) -> Tensor:
    """Exactly `count` of the smallest scores; of equal ones the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = _kth(scores, count)
    if math.isinf(limit):
        raise ValueError(f"{count} of {len(scores)} weights cannot go without emptying a layer")
    dropped = scores < limit
    ties = (scores == limit).nonzero().flatten()
    dropped[ties[: count - int(dropped.count_nonzero())]] = True
    return dropped


def _kth(scores: Tensor, k: int) -> float:
    """The k-th smallest score (k from 1), NaN last. NumPy's vectorized selection takes a tenth of `Tensor.kthvalue`."""
    return float(np.partition(scores.cpu().numpy(), k - 1)[k - 1])
