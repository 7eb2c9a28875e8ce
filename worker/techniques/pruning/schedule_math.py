"""Gradual pruning: the cubic sparsity schedule of Zhu & Gupta 2017, "To prune, or not to prune"."""

from __future__ import annotations

# The sparsity grows over this share of the training; the rest is for recovering at the final sparsity.
GROWING_SHARE = 0.75
# Steps between updates let the network recover; more updates than this change the result little and cost time.
UPDATES = 50


def cubic(step: int, end: int, initial: float, final: float) -> float:
    """s_t = s_f + (s_i - s_f) * (1 - t / end)^3 from step 0 to step `end`, exactly s_f from there on."""
    if step >= end:
        return final
    return final + (initial - final) * (1 - step / end) ** 3


def updates(total: int) -> range:
    """The steps (of a training of `total`) that prune: evenly spaced from 0; the last one reaches the final sparsity.

    A training too short to grow prunes once, before its first step.
    """
    growing = int(total * GROWING_SHARE)
    every = max(1, growing // UPDATES)
    return range(0, growing + 1, every)
