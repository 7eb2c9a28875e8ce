"""From a training with "auto" in it to one whose every setting is known, and what the report says of the way there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from app.contract.optimizing import Optimizer
from app.contract.training import Settled, Training
from worker.context import Context
from worker.techniques.base import Details
from worker.training.finding import race as racing
from worker.training.finding.halving import rounds
from worker.training.finding.judging import judged
from worker.training.finding.race import Run, Setting, Space
from worker.training.finding.range_test import Curve, range_test
from worker.training.finding.throughput import Load, fastest, loads
from worker.training.loop import fed

# One with momentum and one with a rate for each weight: between the two lies most of what optimizers differ in.
RACED: tuple[Optimizer, ...] = ("adamw", "sgd")
# The fastest batch size, and one that takes four times the steps on the same samples.
BATCH_FACTORS = (1, 4)
DEFAULT_LR = 1e-3  # where the rate is given for no batch size in particular
REFERENCE_BATCH = 64  # the contract's default, which a given rate is taken to be meant for
USUAL: dict[Optimizer, float] = {"adagrad": 1e-2, "adafactor": 1e-2, "adadelta": 1.0}
USUAL_SGD = 0.1  # without momentum, by which a gradient counts 1 / (1 - momentum) times
# Beginners of a race, by how many settings are sought.
CANDIDATES = {1: 6, 2: 12, 3: 18}
LEAST_STEPS = 24  # of a run with the smallest batches: below, a rate says nothing of itself


@dataclass
class Search:
    """What was found on the way."""

    curves: list[Curve]
    loads: list[Load]
    runs: list[Run]
    chosen: Setting

    def details(self) -> Details:
        """For the step's report."""
        found: Details = {
            "found_optimizer": self.chosen.optimizer,
            "found_lr": self.chosen.lr,
            "found_batch_size": self.chosen.batch_size,
            "search_samples": sum(run.samples for run in self.runs)
            + sum(len(curve.rates) * curve.batch_size for curve in self.curves),
        }
        for curve in self.curves:
            found[f"lr_range_test_{curve.optimizer}"] = curve.rows()
        if self.loads:
            found["batch_sizes"] = [load.row() for load in self.loads]
        if self.runs:
            found["race"] = [run.row() for run in self.runs]
        return found


def settle(context: Context, training: Training) -> tuple[Settled, Details]:
    """Finds what is "auto": batch size by throughput and memory, rates by range tests, and all of them by a race.

    Where an earlier attempt at the job has found it, and got on to its training, that stands: speeds are never measured
    the same twice. Nothing is done to the model. A given rate is rescaled with a batch size that was found: in
    proportion for sgd (Goyal 2017), by the square root for optimizers that normalize their steps (Malladi 2022).
    """
    if not training.automatic:
        return training.settled(), {}
    remembered = (context.checkpoints and context.checkpoints.remembered()) or {}
    # One process searches: what is fast and what is best is to be the same for all.
    alone = training.model_copy(update={"processes": 1, "hosts": 1, "sharded": False})
    details = remembered if "found_lr" in remembered else context.ranks.told(lambda: _search(context, alone).details())
    if context.checkpoints is not None:
        context.checkpoints.remember(details)
    found: dict[str, Any] = {name: details[f"found_{name}"] for name in ("optimizer", "lr", "batch_size")}
    found["batch_size"] = max(found["batch_size"], training.ranks)  # one for each
    return training.settled(**found), details


def _search(context: Context, training: Training) -> Search:
    samples = fed(context.feed).size("train")
    optimizers = RACED if training.optimizer == "auto" else (training.optimizer,)
    measured: list[Load] = []
    if training.batch_size == "auto":
        measured = loads(context, training.settled(optimizer=optimizers[0], lr=DEFAULT_LR, batch_size=1), samples)
        sizes = _sizes(measured)
    else:
        sizes = [training.batch_size]
    curves = []
    if training.lr == "auto":
        # At the smallest batches: a test takes as many steps of any size.
        known = {"lr": DEFAULT_LR, "batch_size": sizes[-1]}
        curves = [range_test(context, training.settled(optimizer=name, **known)) for name in optimizers]
    space = _space(training, optimizers, sizes, curves)
    chosen = Setting(optimizers[0], space.suggested[optimizers[0], sizes[0]], sizes[0])
    whole = _samples(training, samples, sizes[0])
    beginners = CANDIDATES[len(training.automatic)] if space.free_lr else len(space.suggested)
    plan = rounds(int(training.search.budget * whole), beginners, LEAST_STEPS * min(sizes), whole)
    feed = judged(context)
    runs = racing.race(context, training, space, plan, feed) if plan and feed is not None else []
    if runs:
        chosen = racing.winner(runs)
    if runs and space.free_lr:
        chosen = replace(
            chosen, lr=chosen.lr * longer(runs[-1].samples, _samples(training, samples, chosen.batch_size))
        )
    return Search(curves, measured, runs, chosen)


def _sizes(measured: list[Load]) -> list[int]:
    """The fastest batch size first, then a smaller one that was measured too."""
    size = fastest(measured).batch_size
    known = {load.batch_size for load in measured}
    return [size // factor for factor in BATCH_FACTORS if size // factor in known]


def _samples(training: Training, train: int, batch_size: int) -> int:
    """How many samples the training itself will see."""
    return training.steps * batch_size if training.steps else (training.epochs or 1) * train


def _space(training: Training, optimizers: tuple[Optimizer, ...], sizes: list[int], curves: list[Curve]) -> Space:
    suggested, common = {}, {}
    for name in optimizers:
        for size in sizes:
            common[name, size] = rescaled(usual(name, training.momentum), name, REFERENCE_BATCH, size)
            if training.lr == "auto":
                curve = next(one for one in curves if one.optimizer == name)
                suggested[name, size] = rescaled(curve.suggested, name, curve.batch_size, size)
            else:
                given = REFERENCE_BATCH if training.batch_size == "auto" else size
                suggested[name, size] = rescaled(training.lr, name, given, size)
    return Space(suggested, free_lr=training.lr == "auto", usual=common)


def usual(optimizer: Optimizer, momentum: float) -> float:
    """The rate that people begin with: the default of the optimizer's authors, or of the literature on it."""
    if optimizer == "sgd":
        return USUAL_SGD * (1 - momentum)
    return USUAL.get(optimizer, DEFAULT_LR)


def longer(raced: int, samples: int) -> float:
    """The factor on a rate that was best over `raced` samples, for a training of as many as `samples`.

    By the square root: the step that brings T steps furthest is in proportion to 1 / sqrt(T) (Nemirovski et al. 2009).
    """
    return min(1.0, raced / samples) ** 0.5


def rescaled(lr: float, optimizer: Optimizer, given: int, size: int) -> float:
    """A rate that suits `given` samples a step, for `size` samples a step."""
    ratio = size / given
    return lr * (ratio if optimizer == "sgd" else ratio**0.5)
