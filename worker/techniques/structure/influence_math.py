"""How much a block does to what comes in. Pure functions on tensors of one shape, the first dimension the sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def one_minus_cosine(given: Tensor, made: Tensor, counted: Tensor | None = None) -> Tensor:
    """[samples]: one minus the cosine between what a block takes and gives at each place, its mean over the places of a
    sample (block influence, Men et al. 2024).

    Features are the last dimension, or, of pictures and volumes (four dimensions and more), the second. `counted` is
    bool [samples, places], without those that are padding.
    """
    dim = 1 if given.ndim > 3 else -1
    cosines = functional.cosine_similarity(given.double(), made.double(), dim=dim)
    places = cosines.reshape(len(cosines), -1)
    weights = torch.ones_like(places) if counted is None or counted.shape != places.shape else counted.to(places)
    return 1 - (places * weights).sum(1) / weights.sum(1).clamp(min=1)


def first_order(gradient: Tensor, given: Tensor, made: Tensor) -> Tensor:
    """[samples]: by how much a loss, whose gradient by what a block gives is known, would change to first order if the
    block gave what it takes (after Molchanov et al. 2019, of a block in place of a weight)."""
    products = gradient.double() * (made.double() - given.double())
    return products.reshape(len(products), -1).sum(1).abs()
