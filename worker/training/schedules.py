"""Learning rates as pure functions of the step, so that a run of any length ends where its schedule says.

The one exception, reduce-on-plateau, has a state: `worker.training.plateau`.
"""

from __future__ import annotations

import math
from bisect import bisect_right

from app.contract.errors import InvalidSpec
from app.contract.training import Settled

# The one-cycle policy of Smith & Topin 2018 with the shares that torch's OneCycleLR takes by default:
WARM_UP = 0.3  # share of the steps that the rate grows
START_DIVISOR = 25.0  # peak / first rate
END_DIVISOR = 1e4  # first rate / last rate


def rate(training: Settled, step: int, total: int, per_epoch: int) -> float:
    """The learning rate of step `step` (from 0) of `total`, where an epoch has `per_epoch` steps.

    A warm-up of n steps comes first: (step + 1) / (n + 1) of the rate (linear, as in Goyal et al. 2017, but never 0).
    The schedule begins behind it and ends with the training, but step and multi_step count epochs from the start:

    constant, plateau: the rate itself. step: times gamma every `step_size` epochs; multi_step: at `milestones`.
    exponential: times gamma an epoch, a little at every step. one_cycle: up to the rate and down below its start.
    Down to `end_factor` times the rate: cosine: half a cosine; cosine_restarts: the same over and over, each cycle
    `restart_factor` times longer (both Loshchilov & Hutter 2016); linear; polynomial: (1 - share)^power.
    """
    warm = warmup(training, total)
    if step < warm:
        return training.lr * (step + 1) / (warm + 1)
    done = step - warm
    return training.lr * _factor(training, step, done, total - warm, per_epoch)


def warmup(training: Settled, total: int) -> int:
    """The steps of the warm-up. Raises InvalidSpec where nothing would be left of the training."""
    if training.warmup_steps >= total:
        raise InvalidSpec(
            f"warmup_steps are {training.warmup_steps} and the whole training has {total}. "
            "Give fewer, or warmup_share, or train longer."
        )
    return training.warmup_steps or min(int(training.warmup_share * total), total - 1)


def _factor(training: Settled, step: int, done: int, length: int, per_epoch: int) -> float:
    """The share of the peak at `step`, which is the `done`-th after the warm-up, of `length`."""
    end = training.end_factor
    match training.schedule:
        case "step":
            return training.gamma ** (step // (training.step_size * per_epoch))
        case "multi_step":
            return training.gamma ** bisect_right(training.milestones, step // per_epoch)
        case "exponential":
            return training.gamma ** (done / per_epoch)
        case "cosine":
            return _anneal(1.0, end, done / length)
        case "cosine_restarts":
            return _anneal(1.0, end, _share_of_cycle(done, training.restart_every * per_epoch, training.restart_factor))
        case "one_cycle":
            return _one_cycle(done, length)
        case "linear":
            return end + (1 - end) * (1 - done / length)
        case "polynomial":
            return end + (1 - end) * (1 - done / length) ** training.power
        case "constant" | "plateau":
            return 1.0


def _share_of_cycle(step: int, first: int, factor: int) -> float:
    """How much of the cycle that `step` lies in is over; the first has `first` steps."""
    length = first
    while step >= length:
        step -= length
        length *= factor
    return step / length


def _one_cycle(step: int, total: int) -> float:
    first = 1 / START_DIVISOR
    top = max(0.0, WARM_UP * total - 1)
    if step < top:
        return _anneal(first, 1.0, step / top)
    # A run of a single step takes it at the peak.
    return _anneal(1.0, first / END_DIVISOR, (step - top) / max(total - 1 - top, 1))


def _anneal(start: float, end: float, share: float) -> float:
    """Half a cosine from `start` (share 0) to `end` (share 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
