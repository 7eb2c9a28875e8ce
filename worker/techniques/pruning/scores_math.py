"""What a weight is worth, by element. Each function takes and gives tensors of the weight's shape; higher stays."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|w| (Han, Pool, Tran & Dally 2015)."""
    return weight.abs()


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise: what every other criterion has to be better than."""
    return torch.rand(weight.shape, generator=generator)


def gradient(gradients: Tensor) -> Tensor:
    """|g|, g the gradient of the mean loss."""
    return gradients.abs()


def taylor(weight: Tensor, gradients: Tensor) -> Tensor:
    """|w g|: how the loss changes to first order where w becomes zero (Molchanov et al. 2017)."""
    return (weight * gradients).abs()


def fisher(weight: Tensor, squares: Tensor) -> Tensor:
    """w^2 E[g^2] / 2: how the loss changes to second order, by the diagonal of the empirical Fisher information
    (LeCun, Denker & Solla 1990; Theis et al. 2018). `squares` is the mean over samples of g^2."""
    return weight.square() * squares / 2


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """|W_ij| ||X_j||_2 for W [outputs, inputs] and the norms [inputs] of the inputs over all that was seen (Sun et al.
    2023)."""
    return weight.abs() * norms


def movement(scores: Tensor, weight: Tensor, gradients: Tensor) -> Tensor:
    """The scores after one more step, S - w g: weights that grow away from zero gain (Sanh, Wolf & Rush 2020)."""
    return scores - weight * gradients
