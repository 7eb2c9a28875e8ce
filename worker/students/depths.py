"""Which layers of a stack are left where some are left out."""

from __future__ import annotations


def chosen(count: int, share: float) -> list[int]:
    """A share of `count` places, at least one, evenly from the first to the last (as in Sanh et al. 2019)."""
    return spread(count, max(1, round(share * count)))


def spread(count: int, left: int) -> list[int]:
    """`left` of `count` places, evenly from the first to the last; the first alone where one is left."""
    if left == 1:
        return [0]
    return [round(i * (count - 1) / (left - 1)) for i in range(left)]
