"""Ranges of activations out of histograms: what of a tensor's values 8 bits are spread over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LEVELS = 256
TRIED = 120  # ranges, each a few percent narrower than the one before
LEAST = 0.05  # of the whole range, that is tried
# For the divergence: in a narrower range a level has so few bins that it follows the noise of their counts.
LEAST_ENTROPY = 0.25
SWEEPS = 2  # over both ends


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, with zero between them or at an end."""

    low: float
    high: float

    @classmethod
    def around_zero(cls, low: float, high: float) -> Range:
        return cls(min(0.0, float(low)), max(0.0, float(high)))

    def joined(self, other: Range) -> Range:
        """The least that holds both."""
        return Range(min(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True)
class Histogram:
    """How many values lie in each of `counts` equal parts of the range from `low` to `high`."""

    low: float
    high: float
    counts: np.ndarray

    @property
    def centres(self) -> np.ndarray:
        width = (self.high - self.low) / len(self.counts)
        return self.low + width * (np.arange(len(self.counts)) + 0.5)

    @property
    def whole(self) -> Range:
        return Range.around_zero(self.low, self.high)


def counted(values: np.ndarray, low: float, high: float, bins: int) -> np.ndarray:
    """The counts [bins] of a tensor's values between the limits; zeros are left out, since every grid has zero."""
    return np.histogram(values[values != 0], bins, (low, high))[0]


def percentile(histogram: Histogram, percent: float) -> Range:
    """What holds so much of the values, as much being cut off at either end; an end at zero stays.

    The values' shares, not counted zeros, are of those that differ from zero.
    """
    total = histogram.counts.sum()
    if not total:
        return histogram.whole
    below = np.cumsum(histogram.counts) / total
    ends = (histogram.low < 0) + (histogram.high > 0)
    cut = (1 - percent / 100) / max(1, ends)
    edges = np.linspace(histogram.low, histogram.high, len(histogram.counts) + 1)
    low = edges[np.searchsorted(below, cut, "right")] if histogram.low < 0 else 0.0
    high = edges[np.searchsorted(below, 1 - cut) + 1] if histogram.high > 0 else 0.0
    return Range.around_zero(low, high)


def least_squares(histogram: Histogram, levels: int = LEVELS) -> Range:
    """The range with the least squared error of values that are rounded and clipped to it."""
    centres, counts = histogram.centres, histogram.counts

    def error(tried: Range) -> float:
        return float(counts @ np.square(rounded(centres, tried, levels) - centres))

    return _best(histogram, error)


def entropy(histogram: Histogram, levels: int = LEVELS) -> Range:
    """The range with the least Kullback-Leibler divergence of the rounded values' distribution from the values' own
    (Migacz, 8-bit inference with TensorRT, 2017)."""
    centres, counts = histogram.centres, histogram.counts.astype(float)
    return _best(histogram, lambda tried: _divergence(centres, counts, tried, levels), LEAST_ENTROPY)


def rounded(values: np.ndarray, own: Range, levels: int = LEVELS) -> np.ndarray:
    """The nearest of `levels` values, equally far apart, of which zero is one."""
    step = (own.high - own.low) / (levels - 1)
    if step == 0:
        return np.zeros_like(values)
    zero = np.round(-own.low / step)
    return (np.clip(np.round(values / step) + zero, 0, levels - 1) - zero) * step


def _best(histogram: Histogram, error: Callable[[Range], float], least: float = LEAST) -> Range:
    """Both ends drawn in together, and then each by itself."""
    whole = histogram.whole
    if not histogram.counts.any():
        return whole
    shares = np.geomspace(least, 1.0, TRIED)
    best = min((Range(share * whole.low, share * whole.high) for share in shares), key=error)
    if whole.low < 0 < whole.high:
        for _ in range(SWEEPS):
            best = min((Range(share * whole.low, best.high) for share in shares), key=error)
            best = min((Range(best.low, share * whole.high) for share in shares), key=error)
    return min((whole, best), key=error)


def _divergence(centres: np.ndarray, counts: np.ndarray, tried: Range, levels: int) -> float:
    """sum p log(p / q), with what is cut off at the ends counted there in p, and q even over the bins of a level."""
    inside = (centres >= tried.low) & (centres <= tried.high)
    if not inside.any():
        return np.inf
    p = counts[inside].copy()
    p[0] += counts[centres < tried.low].sum()
    p[-1] += counts[centres > tried.high].sum()
    step = (tried.high - tried.low) / (levels - 1)
    level = np.round(centres[inside] / step).astype(np.int64)
    level -= level.min()
    filled = counts[inside] > 0
    own = np.bincount(level, counts[inside])
    bins = np.bincount(level, filled)
    q = np.where(filled, own[level] / np.maximum(bins[level], 1), 0.0)
    if not q.sum():
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    both = (p > 0) & (q > 0)
    lost = p[(p > 0) & (q == 0)].sum()  # an end that only what was cut off fills
    return float(np.sum(p[both] * np.log(p[both] / q[both]))) + float(lost) * np.log(len(p))
