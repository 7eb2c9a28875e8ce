"""Learning rates against torch's own schedulers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.optim import lr_scheduler

from app.contract.training import Training
from worker.training.schedules import rate

PEAK = 0.1
PER_EPOCH = 7

Reference = Callable[[torch.optim.Optimizer, int], lr_scheduler.LRScheduler]
REFERENCES: dict[str, Reference] = {
    "constant": lambda optimizer, total: lr_scheduler.ConstantLR(optimizer, factor=1.0),
    "step": lambda optimizer, total: lr_scheduler.StepLR(optimizer, step_size=3 * PER_EPOCH, gamma=0.3),
    "cosine": lambda optimizer, total: lr_scheduler.CosineAnnealingLR(optimizer, total),
    "one_cycle": lambda optimizer, total: lr_scheduler.OneCycleLR(
        optimizer, PEAK, total_steps=total, cycle_momentum=False
    ),
}


@pytest.mark.parametrize("total", [10, 70, 501])
@pytest.mark.parametrize("schedule", REFERENCES)
def test_rates_equal_those_of_torch(schedule: str, total: int) -> None:
    training = Training(lr=PEAK, schedule=schedule, step_size=3, gamma=0.3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    reference = REFERENCES[schedule](optimizer, total)
    for step in range(total):
        assert rate(training, step, total, PER_EPOCH) == pytest.approx(reference.get_last_lr()[0], rel=1e-6, abs=1e-9)
        optimizer.step()
        if step + 1 < total:
            reference.step()


@pytest.mark.parametrize("schedule", REFERENCES)
@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_trainings_have_a_rate_worth_stepping(schedule: str, total: int) -> None:
    rates = [rate(Training(lr=PEAK, schedule=schedule), step, total, 1) for step in range(total)]
    assert max(rates) == pytest.approx(PEAK)
    assert all(0 <= r <= PEAK * (1 + 1e-9) for r in rates)
