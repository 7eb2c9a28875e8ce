"""Scalar quantization to a few values: k-means on a line, with or without regard to how the values will be coded."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Codes = NDArray[np.intp]
Start = Literal["linear", "density", "kmeans++"]

ROUNDS = 300  # k-means on a line settles within some dozens, from a bad start within hundreds
SAMPLE = 1 << 20  # values that entries are found with; all are assigned
AT_ONCE = 1 << 18  # values whose distances to all entries are held


def begin(values: Floats, count: int, start: Start, random: np.random.Generator) -> Floats:
    """`count` first entries, ascending, for `values` [n] of which that many differ.

    linear: from the least to the greatest at even distances (Han, Mao & Dally 2016 found this best, since the few large
    weights matter most). density: at even shares of the values. kmeans++: drawn far from one another.
    """
    match start:
        case "linear":
            return np.linspace(values.min(), values.max(), count)
        case "density":
            return np.unique(np.quantile(values, (np.arange(count) + 0.5) / count, method="nearest"))
        case "kmeans++":
            chosen = [random.choice(values)]
            nearest = np.square(values - chosen[0])
            while len(chosen) < count and nearest.sum() > 0:
                chosen.append(random.choice(values, p=nearest / nearest.sum()))
                nearest = np.minimum(nearest, np.square(values - chosen[-1]))
            return np.sort(np.array(chosen))


def settle(values: Floats, entries: Floats, price: float = 0.0) -> Floats:
    """Entries at the means of what is assigned to them, after rounds of both (Lloyd 1957; MacQueen 1967).

    `price` is what a bit of the code costs in squared distance. Entries that nothing is assigned to are left out.
    """
    if len(values) > SAMPLE:
        values = values[:: len(values) // SAMPLE + 1]
    shares = None
    before = None
    for _ in range(ROUNDS):
        codes = assign(values, entries, shares, price)
        counts = np.bincount(codes, minlength=len(entries))
        used = counts > 0
        entries = (np.bincount(codes, values, len(entries))[used]) / counts[used]
        shares = counts[used] / len(values)
        if before is not None and np.array_equal(before, codes):
            break
        before = codes
    return entries


def assign(values: Floats, entries: Floats, shares: Floats | None = None, price: float = 0.0) -> Codes:
    """For each value the entry of the least (v - e)^2 + price * bits, an entry of share p taking log2(1 / p) bits.

    Without a price the nearest; of two that are as near the smaller.
    """
    if price == 0 or shares is None:
        order = np.argsort(entries, kind="stable")
        ascending = entries[order]
        found: Codes = order[np.searchsorted((ascending[1:] + ascending[:-1]) / 2, values)]
        return found
    cost = -price * np.log2(shares)
    codes = np.empty(len(values), np.intp)
    for first in range(0, len(values), AT_ONCE):
        part = values[first : first + AT_ONCE]
        codes[first : first + AT_ONCE] = np.argmin(np.square(part[:, None] - entries) + cost, axis=1)
    return codes


def shared(
    values: Floats, count: int, start: Start, entropy_weight: float, random: np.random.Generator
) -> tuple[Codes, Floats]:
    """Codes [n] and at most `count` entries for values [n], one or more.

    `entropy_weight` is the price of a bit in variances of the values.
    """
    differing = np.unique(values)
    if len(differing) <= count and entropy_weight == 0:
        return np.searchsorted(differing, values), differing
    entries = begin(values, min(count, len(differing)), start, random)
    price = entropy_weight * float(values.var())
    entries = settle(values, entries, price)
    shares = np.bincount(assign(values, entries), minlength=len(entries)) / len(values) if price else None
    if shares is not None and price:
        entries, shares = _used(entries, shares)
        shares = np.bincount(assign(values, entries, shares, price), minlength=len(entries)) / len(values)
        entries, shares = _used(entries, shares)
    codes = assign(values, entries, shares, price)
    counts = np.bincount(codes, minlength=len(entries))
    if (counts == 0).any():
        place = np.cumsum(counts > 0) - 1
        codes, entries, counts = place[codes], entries[counts > 0], counts[counts > 0]
    return codes, np.bincount(codes, values, len(entries)) / counts


def _used(entries: Floats, shares: Floats) -> tuple[Floats, Floats]:
    return entries[shares > 0], shares[shares > 0]


def entropy(codes: Codes) -> float:
    """Bits a code takes on the mean, by the frequencies (Shannon 1948)."""
    counts = np.bincount(codes)
    shares = counts[counts > 0] / len(codes)
    return float(-(shares * np.log2(shares)).sum())
