"""Sparse variational dropout: what noise on weights costs, and what it says of them (Molchanov, Ashukha & Vetrov 2017,
"Variational Dropout Sparsifies Deep Neural Networks"). Each function takes and gives tensors of a weight's shape."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695  # of the paper's equation 14
_SQUARE = 1e-8  # is added to squares whose logarithm is taken
_MOST = 10.0  # beyond it log alpha says nothing more


def log_alpha(weight: Tensor, log_variance: Tensor) -> Tensor:
    """log(s^2 / w^2), how much of a weight is noise; between -10 and 10."""
    return (log_variance - (weight.square() + _SQUARE).log()).clamp(-_MOST, _MOST)


def divergence(log_alpha: Tensor) -> Tensor:
    """What N(w, alpha w^2) has over the log-uniform prior in nats, but for a constant: near 0 for nothing but noise,
    about -log(alpha) / 2 + 0.64 for a weight that is known well. Equation 14, with an error below 0.01."""
    return _K1 * torch.sigmoid(-_K2 - _K3 * log_alpha) + functional.softplus(-log_alpha) / 2


def signal_to_noise(weight: Tensor, log_variance: Tensor) -> Tensor:
    """w^2 / s^2. Where the noise has come to rest it is as large as the loss allows, so this is what taking the weight
    away costs, as in Optimal Brain Damage (LeCun, Denker & Solla 1990)."""
    return weight.square() * (-log_variance).exp()
