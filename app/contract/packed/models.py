"""Probabilities that a file states: each one byte, read as whole numbers so that every machine finds the same.

A weight is 2^(24 - q/8), rounded, q the byte: a step is 9 %, which costs a symbol about a thousandth of a bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STEPS = 8  # of q, to half a weight
TOP = 24  # bits of the largest weight
# round(2^24 * 2^(-f/8)) for f of 0 to 7, written out: pow() may differ by a bit from one machine to the next.
_FRACTIONS = (16777216, 15384775, 14107901, 12937002, 11863283, 10878679, 9975792, 9147842)
WEIGHTS: NDArray[np.int64] = np.array([max(1, _FRACTIONS[q % STEPS] >> q // STEPS) for q in range(256)], np.int64)

# Of a coin, one byte: that nothing or everything is set, or which side is the rarer and how rare.
NEVER, ALWAYS = 255, 254
_SIDE = 127  # bytes of each side


def quantized(counts: NDArray[np.integer]) -> NDArray[np.uint8]:
    """The bytes for symbols that occur `counts` times, each at least once."""
    shares = counts / counts.max()
    found: NDArray[np.uint8] = np.minimum(np.rint(-np.log2(shares) * STEPS), 255).astype(np.uint8)
    return found


def probabilities(bytes_: NDArray[np.uint8]) -> NDArray[np.float64]:
    """What the coder is given: weights over their sum; exact in float64 up to the one division."""
    weights = WEIGHTS[bytes_]
    found: NDArray[np.float64] = weights / weights.sum()
    return found


def coin(ones: int, count: int) -> int:
    """The byte for a bit that is set `ones` times of `count`, which is at least 1."""
    if ones in (0, count):
        return ALWAYS if ones else NEVER
    rarer = min(ones, count - ones) / count
    q = int(np.clip(np.rint((-np.log2(rarer) - 1) * STEPS), 0, _SIDE - 1))
    return q if 2 * ones <= count else _SIDE + q


def coin_probabilities(byte: int) -> NDArray[np.float64]:
    """Of a bit that is not set, and one that is; `byte` is neither NEVER nor ALWAYS."""
    rarer = WEIGHTS[byte % _SIDE] / (1 << TOP + 1)
    return np.array([rarer, 1 - rarer] if byte >= _SIDE else [1 - rarer, rarer])
