"""AWQ (Lin, Tang, Tang, Yang, Dang & Han 2023): channels that carry much get larger weights before they are rounded, so
that those are rounded relatively finer, and what makes the channels gives them smaller.

Factors are s = m^a with m the size of a channel and one a for all, found by trying. The paper's m is the mean of |x|;
here it is the root of the mean of x^2, which comes out of the moments that the error needs anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

COARSE = (0.0, 0.2, 0.4, 0.6, 0.8)  # exponents that are tried
FINER = (0.1, 0.05)  # steps to both sides of the best so far
LEAST = 1e-4  # of a factor


def factors(moments: Tensor, exponent: float) -> Tensor:
    """s [channels] of `moments` [channels, channels], X X^T; the largest and the smallest lie around 1."""
    found = moments.diagonal().clamp(min=0).sqrt().pow(exponent).clamp(min=LEAST)
    return found / (found.max() * found.min()).sqrt()


def output_error(change: Tensor, moments: Tensor) -> float:
    """||D X||^2 of a change D [outputs, channels] of a weight: tr(D H D^T) with H = X X^T."""
    return float(((change @ moments) * change).sum())


def best_factors(
    weights: Sequence[Tensor], moments: Tensor, rounded: Callable[[int, Tensor], Tensor]
) -> tuple[Tensor, float]:
    """The factors with which all of `weights` [outputs, channels], rounded (`rounded` is told which one it is), change
    least of what they give, and their exponent: 0, without any, where none helps."""
    errors: dict[float, float] = {}

    def best_of(exponents: Sequence[float]) -> float:
        for exponent in exponents:
            own = factors(moments, exponent)
            errors[exponent] = sum(
                output_error(rounded(number, weight * own) / own - weight, moments)
                for number, weight in enumerate(weights)
            )
        return min(errors, key=lambda one: errors[one])

    exponent = best_of(COARSE)
    for step in FINER:
        exponent = best_of([round(exponent + way * step, 2) for way in (-1, 1) if exponent + way * step > 0])
    return factors(moments, exponent), exponent
