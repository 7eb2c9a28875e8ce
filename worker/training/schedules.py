"""Learning rates as pure functions of the step, so that a run of any length ends where its schedule says."""

from __future__ import annotations

import math

from app.contract.training import Training

# The one-cycle policy of Smith & Topin 2018 with the shares that torch's OneCycleLR takes by default:
WARM_UP = 0.3  # share of the steps that the rate grows
START_DIVISOR = 25.0  # peak / first rate
END_DIVISOR = 1e4  # first rate / last rate


def rate(training: Training, step: int, total: int, per_epoch: int) -> float:
    """The learning rate of step `step` (from 0) of `total`, where an epoch has `per_epoch` steps.

    constant: the rate itself. step: times gamma every `step_size` epochs. cosine: half a cosine down to 0 at `total`
    (Loshchilov & Hutter 2016, without restarts). one_cycle: up to the rate and down below where it began.
    """
    if training.schedule == "step":
        return training.lr * training.gamma ** (step // (training.step_size * per_epoch))
    if training.schedule == "cosine":
        return _anneal(training.lr, 0.0, step / total)
    if training.schedule == "one_cycle":
        return _one_cycle(training.lr, step, total)
    return training.lr


def _one_cycle(peak: float, step: int, total: int) -> float:
    first = peak / START_DIVISOR
    top = max(0.0, WARM_UP * total - 1)
    if step < top:
        return _anneal(first, peak, step / top)
    # A run of a single step takes it at the peak.
    return _anneal(peak, first / END_DIVISOR, (step - top) / max(total - 1 - top, 1))


def _anneal(start: float, end: float, share: float) -> float:
    """Half a cosine from `start` (share 0) to `end` (share 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
