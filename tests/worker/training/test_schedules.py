"""Learning rates against torch's own schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from app.contract.errors import InvalidSpec
from app.contract.training import Training
from worker.training.plateau import Plateau
from worker.training.schedules import rate, warmup

PEAK = 0.1
PER_EPOCH = 7

Reference = Callable[[torch.optim.Optimizer, int], lr_scheduler.LRScheduler]
# The fields of each schedule, and torch's own with the same.
SCHEDULES: dict[str, tuple[dict[str, Any], Reference]] = {
    "constant": ({}, lambda optimizer, total: lr_scheduler.ConstantLR(optimizer, factor=1.0)),
    "step": (
        {"step_size": 3, "gamma": 0.3},
        lambda optimizer, total: lr_scheduler.StepLR(optimizer, step_size=3 * PER_EPOCH, gamma=0.3),
    ),
    "multi_step": (
        {"milestones": (1, 4, 5), "gamma": 0.3},
        lambda optimizer, total: lr_scheduler.MultiStepLR(optimizer, [PER_EPOCH, 4 * PER_EPOCH, 5 * PER_EPOCH], 0.3),
    ),
    "exponential": (
        {"gamma": 0.5},
        lambda optimizer, total: lr_scheduler.ExponentialLR(optimizer, 0.5 ** (1 / PER_EPOCH)),
    ),
    "cosine": (
        {"end_factor": 0.1},
        lambda optimizer, total: lr_scheduler.CosineAnnealingLR(optimizer, total, eta_min=0.1 * PEAK),
    ),
    "cosine_restarts": (
        {"restart_every": 2, "restart_factor": 3, "end_factor": 0.1},
        lambda optimizer, total: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2 * PER_EPOCH, 3, 0.1 * PEAK),
    ),
    "one_cycle": (
        {},
        lambda optimizer, total: lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=total, cycle_momentum=False),
    ),
    "linear": (
        {"end_factor": 0.1},
        lambda optimizer, total: lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=total),
    ),
    "polynomial": ({"power": 3}, lambda optimizer, total: lr_scheduler.PolynomialLR(optimizer, total, power=3)),
}
WARMED = [name for name in SCHEDULES if name not in ("step", "multi_step", "one_cycle")]


def of_torch(scheduler: lr_scheduler.LRScheduler, total: int) -> list[float]:
    rates = []
    for _ in range(total):
        rates.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        if len(rates) < total:
            scheduler.step()
    return rates


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)


@pytest.mark.parametrize("total", [10, 70, 501])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_equal_those_of_torch(schedule: str, total: int) -> None:
    fields, reference = SCHEDULES[schedule]
    training = Training(lr=PEAK, schedule=schedule, **fields)
    rates = [rate(training, step, total, PER_EPOCH) for step in range(total)]
    assert rates == pytest.approx(of_torch(reference(sgd(), total), total), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("schedule", WARMED)
def test_a_warm_up_comes_first_and_the_schedule_ends_with_the_training(schedule: str) -> None:
    total, warm = 70, 5
    fields, reference = SCHEDULES[schedule]
    by_steps = Training(lr=PEAK, schedule=schedule, warmup_steps=warm, **fields)
    by_share = Training(lr=PEAK, schedule=schedule, warmup_share=warm / total + 1e-9, **fields)
    expected = [PEAK * step / 6 for step in range(1, 6)] + of_torch(reference(sgd(), total - warm), total - warm)
    for training in (by_steps, by_share):
        rates = [rate(training, step, total, PER_EPOCH) for step in range(total)]
        assert rates == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_cuts_at_epochs_count_the_warm_up_too() -> None:
    training = Training(lr=PEAK, schedule="step", step_size=1, gamma=0.5, warmup_steps=3)
    rates = [rate(training, step, 14, PER_EPOCH) for step in range(14)]
    assert rates == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4] + [PEAK] * 4 + [PEAK / 2] * 7)


def test_a_warm_up_leaves_something_of_the_training() -> None:
    with pytest.raises(InvalidSpec, match="warmup_steps are 9 and the whole training has 9"):
        warmup(Training(warmup_steps=9), 9)
    assert warmup(Training(warmup_share=0.99), 1) == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_trainings_have_a_rate_worth_stepping(schedule: str, total: int) -> None:
    fields, _ = SCHEDULES[schedule]
    rates = [rate(Training(lr=PEAK, schedule=schedule, **fields), step, total, 5) for step in range(total)]
    assert max(rates) == pytest.approx(PEAK)
    assert all(0 <= r <= PEAK * (1 + 1e-9) for r in rates)


@pytest.mark.parametrize("patience", [0, 2])
def test_a_plateau_is_cut_as_torch_cuts_it(patience: int) -> None:
    metrics = [0.5, 0.6, 0.6, 0.60001, 0.55, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.71, 0.7]
    training = Training(schedule="plateau", gamma=0.3, plateau_patience=patience, end_factor=0.02)
    ours, optimizer = Plateau(training), sgd()
    reference = lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.3, patience=patience, min_lr=0.02 * PEAK, eps=0
    )
    for metric in metrics:
        ours.judge(metric)
        reference.step(metric)
        assert ours.factor * PEAK == pytest.approx(optimizer.param_groups[0]["lr"])
    assert ours.factor < 1
    again = Plateau(training)
    again.load(ours.state())
    assert again.state() == ours.state()
