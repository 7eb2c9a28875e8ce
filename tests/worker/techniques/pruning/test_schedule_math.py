"""The cubic of Zhu & Gupta 2017 by hand."""

from __future__ import annotations

import pytest

from worker.techniques.pruning.schedule_math import UPDATES, beginnings, cubic, geometric, updates


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (25, 0.8 - 0.8 * 0.421875),  # 0.75^3
        (50, 0.8 - 0.8 * 0.125),
        (75, 0.8 - 0.8 * 0.015625),
        (100, 0.8),
        (140, 0.8),
    ],
)
def test_the_sparsity_by_hand(step: int, expected: float) -> None:
    assert cubic(step, 100, 0.0, 0.8) == pytest.approx(expected, abs=1e-12)


def test_it_starts_where_an_earlier_pruning_ended() -> None:
    assert cubic(0, 10, 0.5, 0.9) == pytest.approx(0.5)
    assert cubic(5, 10, 0.5, 0.9) == pytest.approx(0.9 - 0.4 / 8)
    assert cubic(10, 10, 0.5, 0.9) == 0.9


@pytest.mark.parametrize("total", [1, 2, 3, 4, 10, 67, 275, 1000, 123_457])
def test_updates_are_even_few_and_leave_time_to_recover(total: int) -> None:
    steps = updates(total)
    assert steps[0] == 0
    assert steps[-1] <= 0.75 * total
    assert total - steps[-1] >= total / 4
    assert len(steps) <= 2 * UPDATES + 1
    if total >= 100:
        assert steps[-1] > 0.7 * total


def test_every_round_leaves_the_same_share_of_what_it_finds() -> None:
    found = [geometric(number, 4, 0.0, 0.9375) for number in range(6)]
    assert found == pytest.approx([0.0, 0.5, 0.75, 0.875, 0.9375, 0.9375])
    assert geometric(1, 2, 0.5, 0.875) == pytest.approx(0.75)


def test_rounds_begin_at_even_distances() -> None:
    assert beginnings(100, 4) == [0, 25, 50, 75]
    assert beginnings(2, 4) == [0, 0, 1, 1]
