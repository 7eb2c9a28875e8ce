"""A limit is met by choices whose estimates are wrong, and by such as no estimate finds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from worker.techniques.structure.meeting import Choice, halfway, met
from worker.techniques.structure.unit_limits import UnitLimit

PARTS = 8
WHOLE = 100.0 * PARTS


def limit(share: float) -> UnitLimit:
    return UnitLimit("macs", share, WHOLE)


def alike(step: int) -> Callable[[float], Choice]:
    """All parts keep the same, a multiple of `step` of 100."""
    return lambda most: dict.fromkeys(range(PARTS), max(step, int(most / PARTS) // step * step))


def cost(choice: Choice) -> float:
    return float(sum(choice.values()))


@pytest.mark.parametrize("wrong", [0.5, 0.8, 1.3, 2.0])
def test_estimates_that_are_wrong_by_a_factor_are_corrected(wrong: float) -> None:
    found = met(limit(0.6), alike(1), lambda choice: wrong * cost(choice), cost)
    assert found is not None
    assert found[0] == cost(found[1])
    assert 0.98 * 0.6 <= found[0] / WHOLE <= 0.6


def test_what_no_estimate_finds_is_made_of_two_that_it_does() -> None:
    """Of multiples of 50 all alike only half the whole is within; of some parts whole and some half 0.6 is."""
    found = met(limit(0.6), alike(50), lambda choice: 0.9 * cost(choice), cost)
    assert found is not None
    assert set(found[1].values()) <= {50, 100}
    assert 0.55 <= found[0] / WHOLE <= 0.6
    alone = met(limit(0.6), alike(50), lambda choice: 0.9 * cost(choice), cost, mixes=False)
    assert alone is not None
    assert set(alone[1].values()) == {50}


def test_what_costs_more_than_it_should_is_none() -> None:
    assert met(limit(0.1), alike(50), cost, cost) is None


def test_a_choice_between_two_is_like_either_in_part() -> None:
    assert halfway({"a": 1, "b": 1, "c": 1, "d": 1}, {"a": 2, "b": 1, "c": 2, "d": 2}) == {
        "a": 2,
        "b": 1,
        "c": 1,
        "d": 2,
    }
    assert halfway({"a": 1, "b": 1}, {"a": 1, "b": 2}) is None
