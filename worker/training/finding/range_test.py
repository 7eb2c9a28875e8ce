"""The learning-rate range test (Smith 2015): a few steps at growing rates, on a copy of the model."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from app.contract.errors import TrainingDiverged
from app.contract.optimizing import Optimizer
from app.contract.training import Settled, Training
from worker.context import Context
from worker.training.finding import curve
from worker.training.finding.rehearsal import brief, rehearsal
from worker.training.loop import train

STEPS = 100
FIRST, LAST = 1e-6, 10.0
# A step of these is about the rate itself, in every weight: with more, nothing of the weights is left.
NORMALIZED: tuple[Optimizer, ...] = ("adam", "adamw", "nadam", "radam", "rmsprop", "adafactor")
LAST_NORMALIZED = 0.03
# Where the loss never falls, which happens to models that have nothing to learn: a rate that harms none.
CAUTIOUS = 1e-4


@dataclass(frozen=True)
class Curve:
    """Smoothed losses by rate, as far as the test went, and the rate that they suggest."""

    optimizer: Optimizer
    batch_size: int
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggested: float

    def rows(self) -> list[dict[str, float | int | str | None]]:
        """For a report: a point of the curve each."""
        return [{"lr": rate, "loss": loss} for rate, loss in zip(self.rates, self.losses, strict=True)]


def highest(training: Training) -> float:
    """The rate that no test and no race goes beyond; with momentum a gradient counts 1 / (1 - momentum) times."""
    if training.optimizer in NORMALIZED:
        return LAST_NORMALIZED
    return LAST * (1 - training.momentum) if training.optimizer == "sgd" else LAST


class _Blown(Exception):
    """The test has seen enough."""


def range_test(context: Context, training: Settled, steps: int = STEPS) -> Curve:
    """Trains a copy with `training`'s optimizer and batch size for `steps` steps at rates from 1e-6 to the highest.

    It ends early where the loss has blown up. What was done to the copy is lost.
    """
    rates = curve.geometric(FIRST, highest(training), steps)
    losses: list[float] = []

    def watch(loss: float) -> None:
        losses.append(loss)
        if curve.blown_up(curve.smoothed(losses)):
            raise _Blown

    with contextlib.suppress(_Blown, TrainingDiverged):
        train(rehearsal(context), brief(training, steps), rate=rates.__getitem__, on_loss=watch)
    smooth = curve.smoothed(losses)
    used = rates[: len(smooth)]
    found = curve.suggestion(used, smooth) if smooth else None
    return Curve(training.optimizer, training.batch_size, tuple(used), tuple(smooth), found or CAUTIOUS)
