"""SmoothQuant (Xiao, Lin, Seznec, Wu, Demouth & Han 2023): channels that reach far are made smaller before they are
rounded, and the weights that read them larger.

Factors are s = max|x|^a / max|w|^(1 - a) for each channel. Here a is tried out: the best is that with which the
products, inputs and weights rounded to 8 bits, change least.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EXPONENTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
REACHES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the median channel's, that others are brought down to
LEAST = 1e-5  # of a channel's reach, relative to the largest


def by_exponent(given: Tensor, weights: Sequence[Tensor], exponent: float) -> Tensor:
    """s [channels] for inputs [rows, channels] and the weights [outputs, channels] that read them."""
    reach = given.abs().amax(0)
    strength = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    reach, strength = (value.clamp(min=LEAST * float(value.max()) or 1.0) for value in (reach, strength))
    found = reach**exponent / strength ** (1 - exponent)
    return found / (found.max() * found.min()).sqrt()


def by_reach(given: Tensor, times: float) -> Tensor:
    """s [channels] that brings channels down to so many times the median one's reach, and leaves the others."""
    reach = given.abs().amax(0)
    least = LEAST * float(reach.max()) or 1.0
    return (reach / (times * reach.median().clamp(min=least))).clamp(min=1.0)


def rounded_inputs(given: Tensor, levels: int = 256) -> Tensor:
    """The nearest on one grid for all, over their whole range, which has zero on it."""
    low, high = given.min().clamp(max=0.0), given.max().clamp(min=0.0)
    step = (high - low) / (levels - 1)
    if not step:
        return given
    zero = torch.round(-low / step)
    return (torch.clamp(torch.round(given / step) + zero, 0, levels - 1) - zero) * step


def rounded_weights(weight: Tensor, bits: int) -> Tensor:
    """The nearest on a symmetric grid for each output."""
    step = weight.abs().amax(1, keepdim=True) / (1 << bits - 1)
    return torch.round(weight / torch.where(step > 0, step, 1.0)) * step


def error(given: Tensor, weights: Sequence[Tensor], scale: Tensor | None, bits: int) -> float:
    """The sum over products and rows of ||Q(x / s) Q(s w)' - x w'||^2 / ||x w'||^2; without a scale s is 1.

    Relative to its own row, since norms make rows alike: a few of a transformer's are larger by far than all others.
    """
    inputs = rounded_inputs(given if scale is None else given / scale)
    found = 0.0
    for weight in weights:
        exact = given @ weight.T
        power = exact.square().sum(1)
        own = rounded_weights(weight if scale is None else weight * scale, bits)
        noise = (inputs @ own.T - exact).square().sum(1)
        found += float((noise / torch.where(power > 0, power, 1.0)).sum())
    return found


def best_factors(given: Tensor, weights: Sequence[Tensor], bits: int) -> tuple[Tensor, str, float]:
    """The best factors, where they come from, and by how much the error falls: to this share of what it is without."""
    tried = {f"exponent {exponent:g}": by_exponent(given, weights, exponent) for exponent in EXPONENTS}
    tried |= {f"reach {times:g}": by_reach(given, times) for times in REACHES}
    before = error(given, weights, None, bits)
    errors = {name: error(given, weights, scale, bits) for name, scale in tried.items()}
    best = min(errors, key=lambda name: errors[name])
    return tried[best], best, errors[best] / before if before else 1.0
