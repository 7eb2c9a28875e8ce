"""The learning-rate range test as mathematics: rates to try, a smoothed loss, and the rate that its curve suggests."""

from __future__ import annotations

import math
from collections.abc import Sequence

SMOOTHING = 0.9
# Rates are read off where the loss is lowest too, and divided: there, training only just holds.
FROM_LOWEST = 10.0
# A curve that grew this far above its lowest point, counted in the fall before it, has diverged.
BLOWN_UP = 1.0


def geometric(first: float, last: float, count: int) -> list[float]:
    """`count` rates from `first` to `last`, each the same factor above the one before."""
    factor = (last / first) ** (1 / max(count - 1, 1))
    return [first * factor**i for i in range(count)]


def smoothed(losses: Sequence[float], beta: float = SMOOTHING) -> list[float]:
    """The exponential moving average of losses, free of the bias towards its start at zero."""
    mean, found = 0.0, []
    for i, loss in enumerate(losses, 1):
        mean = beta * mean + (1 - beta) * loss
        found.append(mean / (1 - beta**i))
    return found


def blown_up(losses: Sequence[float]) -> bool:
    """Whether a smoothed curve has left for good: it lies above its start by as much as it ever fell below it."""
    fall = losses[0] - min(losses)
    return losses[-1] > losses[0] + BLOWN_UP * max(fall, 0.1 * abs(losses[0]))


def suggestion(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate that a smoothed curve suggests, between its two usual readings (Smith 2015); None where it never falls.

    One is where the loss falls fastest over the logarithm of the rate, before its lowest point; the other is a tenth of
    the rate at the lowest point. Each alone is far off on some networks: the first is too bold where the loss falls
    late and all at once, the second too cautious where it falls early. Taken is their geometric mean.
    """
    lowest = min(range(len(losses)), key=losses.__getitem__)
    if lowest == 0:
        return None
    steps = range(1, lowest + 1)
    slopes = [(losses[i] - losses[i - 1]) / math.log(rates[i] / rates[i - 1]) for i in steps]
    steepest = rates[1 + min(range(len(slopes)), key=slopes.__getitem__)]
    return math.sqrt(steepest * rates[lowest] / FROM_LOWEST)
