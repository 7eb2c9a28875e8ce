"""The decoder of asymmetric numeral systems as docs/packed.md has it, in whole numbers and without a library."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

PRECISION = 24
WORD = 32


class Coder:
    """Words of 32 bits, the last one read first; a state of up to 64 bits."""

    def __init__(self, words: Sequence[int]) -> None:
        self.words, self.state = list(words), 0
        while self.words and self.state < 1 << WORD:
            self.state = self.state << WORD | self.words.pop()

    def take(self, count: int, chances: Sequence[float]) -> list[int]:
        starts = cumulative(chances)
        return [self._one(starts) for _ in range(count)]

    def _one(self, starts: list[int]) -> int:
        at = self.state % (1 << PRECISION)
        symbol = bisect_right(starts, at) - 1
        wide = starts[symbol + 1] - starts[symbol]
        self.state = (self.state >> PRECISION) * wide + at - starts[symbol]
        if self.state < 1 << WORD and self.words:
            self.state = self.state << WORD | self.words.pop()
        return symbol


def cumulative(chances: Sequence[float]) -> list[int]:
    """Where each symbol's share of the 2^24 begins: one for each symbol, the rest by probability, rounded down."""
    scale = ((1 << PRECISION) - len(chances)) / sum(chances)
    starts, total = [], 0.0
    for symbol, chance in enumerate(chances):
        starts.append(int(total * scale) + symbol)
        total += chance
    return [*starts, 1 << PRECISION]
