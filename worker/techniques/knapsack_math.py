"""One option for each layer: of all ways to choose, those that no other is both smaller and better than.

Every layer has a few options, each of some cost and some loss, and losses add up: a multiple-choice knapsack. Instead
of one limit all are solved at once, layer by layer (Nemhauser & Ullmann 1969).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_POINTS = 1 << 14  # held of a frontier: a few seconds for hundreds of layers

Option = tuple[int, float]
"""What it costs, in whole numbers, and its loss."""


@dataclass(frozen=True)
class _Level:
    """The points of the first layers: which option the last of them takes, and which point those before it are at."""

    option: NDArray[np.int64]
    before: NDArray[np.int64]


@dataclass(frozen=True)
class Frontier:
    """The choices that no other is both smaller and better than: `sizes` (bytes) go up and `losses` go down."""

    sizes: NDArray[np.int64]
    losses: NDArray[np.float64]
    _levels: tuple[_Level, ...]

    def __len__(self) -> int:
        return len(self.sizes)

    def choice(self, point: int) -> list[int]:
        """The option of each layer at a point."""
        found = []
        for level in reversed(self._levels):
            found.append(int(level.option[point]))
            point = int(level.before[point])
        return found[::-1]

    def within(self, limit: int) -> int | None:
        """The point of least loss of at most `limit` bytes; None where even the smallest has more."""
        point = int(np.searchsorted(self.sizes, limit, side="right")) - 1
        return point if point >= 0 else None


def frontier(layers: Sequence[Sequence[Option]], most: int = MOST_POINTS) -> Frontier:
    """All the best choices of an option for each layer.

    Exact as long as no more than `most` points are left behind a layer, for losses that are not equal to many digits.
    Beyond that the range of bytes is cut into as many parts and the best of each is kept: what is returned still has
    the bytes that it says, and misses the optimum by what a few parts are worth.
    """
    sizes, losses = np.zeros(1, np.int64), np.zeros(1)
    levels = []
    for options in layers:
        own_sizes = np.array([size for size, _ in options], np.int64)
        own_losses = np.array([max(0.0, loss) for _, loss in options], np.float64)
        all_sizes = (sizes[:, None] + own_sizes).ravel()
        all_losses = (losses[:, None] + own_losses).ravel()
        kept = _thinned(all_sizes, _undominated(all_sizes, all_losses), most)
        levels.append(_Level(kept % len(options), kept // len(options)))
        sizes, losses = all_sizes[kept], all_losses[kept]
    return Frontier(sizes, losses, tuple(levels))


def _undominated(sizes: NDArray[np.int64], losses: NDArray[np.float64]) -> NDArray[np.int64]:
    """The places of those that no other beats, sizes ascending."""
    order = np.lexsort((losses, sizes))
    least = np.minimum.accumulate(losses[order])
    better = np.concatenate([[True], least[1:] < least[:-1]])
    found: NDArray[np.int64] = order[better]
    return found


def _thinned(sizes: NDArray[np.int64], order: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most so many of those in `order`: the last of each part of the range, which is the best there, and the
    smallest."""
    if len(order) <= most:
        return order
    own = sizes[order]
    part = (own - own[0]) * (most - 1) // max(1, int(own[-1] - own[0]))
    last = np.concatenate([part[1:] != part[:-1], [True]])
    last[0] = True
    found: NDArray[np.int64] = order[last]
    return found
