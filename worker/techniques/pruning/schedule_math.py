"""How far pruning has come at each step of a training: 0 nothing of what is to go, 1 all of it."""

from __future__ import annotations

# The sparsity grows over this share of the training; the rest is for recovering at the final sparsity.
GROWING_SHARE = 0.75
# Steps between updates let the network recover; more updates than this change the result little and cost time.
UPDATES = 50


def cubic(step: int, end: int, initial: float, final: float) -> float:
    """s_t = s_f + (s_i - s_f) * (1 - t / end)^3 from step 0 to step `end`, exactly s_f from there on (Zhu & Gupta 2017,
    "To prune, or not to prune")."""
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


def geometric(number: int, rounds: int, initial: float, final: float) -> float:
    """The sparsity after `number` of `rounds` that each leave the same share of what they find (Frankle & Carbin 2019):
    1 - (1 - s_i) * ((1 - s_f) / (1 - s_i))^(n / rounds)."""
    if number >= rounds:
        return final
    return 1 - (1 - initial) * ((1 - final) / (1 - initial)) ** (number / rounds)


def beginnings(total: int, rounds: int) -> list[int]:
    """The steps at which rounds of one training begin; with fewer steps than rounds several begin at once."""
    return [number * total // rounds for number in range(rounds)]
