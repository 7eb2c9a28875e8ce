"""When a training has gone astray."""

from __future__ import annotations

import pytest

from worker.training.divergence import Diverged, Guard


def steady(guard: Guard, loss: float, steps: int) -> None:
    for _ in range(steps):
        guard.watch(loss, final=True)


@pytest.mark.parametrize("begun", [0.001, 2.3, 1e6])
def test_a_loss_that_explodes_is_noticed_within_a_few_steps(begun: float) -> None:
    guard = Guard(1)
    steady(guard, begun, 50)
    level = 100 * max(begun, 1.0)
    with pytest.raises(Diverged, match="The training loss grew to"):
        steady(guard, level, 3)


def test_a_single_bad_batch_is_no_divergence() -> None:
    guard = Guard(1)
    steady(guard, 2.0, 20)
    guard.watch(60.0, final=True)
    assert not guard.sound  # not a state to come back to
    steady(guard, 2.0, 20)
    assert guard.sound


def test_a_small_loss_may_grow_to_what_others_begin_at() -> None:
    guard = Guard(1)
    steady(guard, 1e-6, 20)
    steady(guard, 2.3, 100)


def test_without_retries_a_loss_may_do_what_it_likes() -> None:
    guard = Guard(0)
    steady(guard, 2.3, 20)
    steady(guard, 1e9, 20)


def test_what_constraints_cost_while_they_grow_is_no_divergence() -> None:
    guard = Guard(1)
    for step in range(40):
        guard.watch(1.0 + 100 * step, final=False)
    steady(guard, 4000.0, 30)
    with pytest.raises(Diverged):
        steady(guard, 1e6, 20)


def test_the_rate_falls_with_every_incident() -> None:
    guard = Guard(2)
    assert (guard.factor, guard.exhausted) == (1.0, False)
    guard.incidents = [{"step": 1}, {"step": 2}]
    assert (guard.factor, guard.exhausted) == (1 / 16, True)
    again = Guard(2)
    again.load(guard.state())
    assert again.exhausted
