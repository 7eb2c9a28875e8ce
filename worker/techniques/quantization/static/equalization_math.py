"""Cross-layer equalization (Nagel, van Baalen, Blankevoort & Welling 2019, "Data-Free Quantization Through Weight
Equalization and Bias Correction"): a factor for each channel between two layers, with which the weights that make it
reach as far as those that read it.

Layers are given by their magnitudes [groups, outputs, inputs] within a group: the largest |w| over all places of a
kernel. Channels count through the groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SWEEPS = 50  # over all pairs, at most: a chain of ten is even to half a percent then, shorter ones to less
FAINT = 1e-4  # of the largest: a channel of weights as small is dead, and its bias would be blown up
ENOUGH = 1e-3  # a sweep whose factors are as near to 1 is the last


def balance(made: np.ndarray, read: np.ndarray) -> np.ndarray:
    """s [channels] = sqrt(r1 r2) / r2 of the ranges r1 of the weights that make channels and r2 of those that read
    them: r1 / s = s r2. A channel that is dead on either side, or next to dead, has 1."""
    alive = (made > FAINT * made.max(initial=0.0)) & (read > FAINT * read.max(initial=0.0))
    return np.sqrt(np.where(alive, made, 1.0) / np.where(alive, read, 1.0))


def equalized(magnitudes: Sequence[np.ndarray], pairs: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """The factors [channels] of each pair (the places of the layer that makes the channels, and of the one that reads
    them), found in turns, since a layer's outputs and its inputs may both be of a pair."""
    own = [np.array(values, np.float64) for values in magnitudes]
    found = [np.ones(own[first].shape[0] * own[first].shape[1]) for first, _ in pairs]
    for _ in range(SWEEPS):
        furthest = 0.0
        for place, (first, second) in enumerate(pairs):
            scale = balance(own[first].max(2).ravel(), own[second].max(1).ravel())
            own[first] /= scale.reshape(*own[first].shape[:2], 1)
            own[second] *= scale.reshape(len(own[second]), 1, -1)
            found[place] *= scale
            furthest = max(furthest, float(np.abs(np.log(scale)).max()))
        if furthest < ENOUGH:
            break
    return found
