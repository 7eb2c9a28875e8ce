"""Which units go, beside all choices that there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise, product
from math import ceil, inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.techniques.structure.units_math import (
    Pool,
    descending,
    filled,
    fitting,
    lowest,
    nearer,
    ranks,
    relative,
    within,
)

PRICES = (3.0, 1.0, 2.0, 5.0)


def pool(name: str, scores: list[float], least: int = 1, step: int = 1) -> Pool:
    return Pool(name, torch.tensor(scores, dtype=torch.float64), least, step)


@st.composite
def pools(draw: st.DrawFn) -> list[Pool]:
    found = []
    for place in range(draw(st.integers(1, 4))):
        units = draw(st.integers(2, 12))
        scores = draw(st.permutations(range(units)))
        scale = draw(st.sampled_from([0.1, 1.0, 3.0]))
        least, step = draw(st.integers(1, units)), draw(st.integers(1, units))
        found.append(pool(str(place), [scale * (score + 0.5) for score in scores], least, step))
    return found


def cost(kept: Mapping[str, int]) -> float:
    """Of layers in a row, whose widths multiply, and of the widths themselves."""
    widths = [kept[name] for name in sorted(kept)]
    pairs = sum(a * b for a, b in pairwise(widths))
    return pairs + sum(price * width for price, width in zip(PRICES, widths, strict=False))


def choices(own: Pool) -> set[int]:
    """By the words: all units, or a multiple of the step that is no less than the least."""
    return {own.units, *(count for count in range(own.least, own.units) if count % own.step == 0)}


def whole(found: list[Pool]) -> float:
    return cost({own.name: own.units for own in found})


@given(pools(), st.integers(0, 12))
def test_what_is_allowed_is_a_multiple_or_everything_and_the_nearest(found: list[Pool], count: int) -> None:
    for own in found:
        stays = own.allowed(count)
        assert stays in choices(own)
        assert abs(stays - count) <= min(abs(other - count) for other in choices(own) - {own.units} or {own.units})


@pytest.mark.parametrize(
    ("count", "stays"), [(0, 8), (3, 8), (11, 8), (13, 16), (19, 16), (21, 20), (20, 20), (99, 20)]
)
def test_numbers_are_rounded(count: int, stays: int) -> None:
    assert pool("x", [1.0] * 20, least=3, step=8).allowed(count) == stays


@given(pools(), st.integers(0, 60))
def test_of_the_lowest_go_as_many_as_may(found: list[Pool], count: int) -> None:
    scores = sorted((float(score), own.name) for own in found for score in own.scores)
    kept = lowest(found, count)
    for own in found:
        gone = sum(name == own.name for _, name in scores[:count])
        assert kept[own.name] == own.allowed(own.units - gone)


@settings(max_examples=150, deadline=None)
@given(pools(), st.floats(0.05, 1.2))
def test_a_limit_is_never_exceeded_and_no_step_would_still_fit(found: list[Pool], share: float) -> None:
    most = share * whole(found)
    smallest = min(
        cost(dict(zip([own.name for own in found], counts, strict=True))) for counts in product(*map(choices, found))
    )
    losses = {own.name: _lost(own) for own in found}
    for kept in (fitting(found, cost, most), descending(found, losses, cost, most)):
        assert (kept is None) == (smallest > most)
        if kept is None:
            continue
        assert cost(kept) <= most
        for own in found:
            assert kept[own.name] in choices(own)
            more = min((count for count in choices(own) if count > kept[own.name]), default=None)
            assert more is None or cost({**kept, own.name: more}) > most


def _lost(own: Pool) -> Callable[[int], float]:
    return lambda count: float(own.scores.sort().values[: own.units - count].sum())


def test_of_one_group_the_best_stay_in_order() -> None:
    own = pool("x", [3.0, 1.0, 5.0, 1.0, 4.0])
    assert own.best(3).tolist() == [0, 2, 4]
    assert own.best(4).tolist() == [0, 1, 2, 4]  # of equal ones the first
    assert [own.next_score(count) for count in (0, 2, 3, 5)] == [5.0, 3.0, 1.0, -inf]


def test_without_a_limit_nothing_goes() -> None:
    found = [pool("a", [1.0, 2.0]), pool("b", [3.0, 4.0, 5.0])]
    assert fitting(found, cost, whole(found)) == {"a": 2, "b": 3}


def test_with_one_price_for_all_the_lowest_of_all_go() -> None:
    found = [pool("a", [1.0, 2.0, 9.0, 8.0]), pool("b", [0.5, 7.0, 3.0, 10.0])]
    assert fitting(found, lambda kept: sum(kept.values()), 5) == {"a": 2, "b": 3}


def test_steps_go_back_to_the_highest_scores_first() -> None:
    found = [pool("a", [4.0, 3.0, 2.0, 1.0]), pool("b", [3.5, 2.5, 0.1])]
    assert filled(found, {"a": 1, "b": 1}, lambda kept: sum(kept.values()), 3) == {"a": 2, "b": 1}
    assert filled(found, {"a": 1, "b": 1}, lambda kept: sum(kept.values()), 4) == {"a": 2, "b": 2}
    dear = {"a": 10, "b": 1}
    assert filled(found, {"a": 1, "b": 1}, lambda kept: sum(dear[name] * own for name, own in kept.items()), 13) == {
        "a": 1,
        "b": 3,
    }


def test_by_losses_the_group_goes_that_loses_least_for_what_it_saves() -> None:
    found = [pool("cheap", [1.0] * 16), pool("dear", [1.0] * 16)]
    losses = {"cheap": lambda count: 0.1 * (16 - count), "dear": lambda count: 1.0 * (16 - count)}
    kept = descending(found, losses, lambda own: own["cheap"] + 5 * own["dear"], 90)
    assert kept == {"cheap": 10, "dear": 16}  # 0.1 for one, and 0.2 for one
    losses["dear"] = lambda count: 0.2 * (16 - count)
    assert descending(found, losses, lambda own: own["cheap"] + 5 * own["dear"], 91) == {"cheap": 16, "dear": 15}


def test_steps_that_save_nothing_are_taken_with_those_that_do() -> None:
    """Costs in blocks of 4: a unit less is no cheaper, four are."""
    found = [pool("x", [float(own) for own in range(16)])]
    losses = {"x": lambda count: float(16 - count)}
    assert descending(found, losses, lambda own: -(-own["x"] // 4), 3) == {"x": 12}


@pytest.mark.parametrize("units", [64, 256])
@pytest.mark.parametrize("step", [16, 4, 1])
def test_a_plateau_is_left_however_long_it_is(units: int, step: int) -> None:
    """Three quarters cost as much as all."""
    found = [pool("x", [float(own) for own in range(units)], step=step)]
    kept = descending(
        found, {"x": lambda count: float(units - count)}, lambda own: min(own["x"], 0.75 * units), 0.7 * units
    )
    assert kept is not None
    assert 0.7 * units - step < kept["x"] <= 0.7 * units


def test_without_groups_there_is_nothing_to_choose() -> None:
    assert fitting([], lambda own: 3.0, 3) == {}
    assert fitting([], lambda own: 3.0, 2) is None


@given(pools(), st.floats(0.1, 0.9))
def test_local_takes_the_same_share_of_every_group(found: list[Pool], share: float) -> None:
    own = within({one.name: one.scores for one in found}, {one.name: one.name for one in found})
    plain = [Pool(name, scores, 1, 1) for name, scores in own.items()]
    count = ceil(share * sum(one.units for one in plain))
    kept = lowest(plain, count)
    for one in plain:
        assert abs(kept[one.name] - max(1, (1 - count / sum(p.units for p in plain)) * one.units)) <= 1


def test_ranks_are_places_in_the_order_of_all() -> None:
    first, second = ranks([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])])
    assert first.tolist() == [0.875, 0.125]
    assert second.tolist() == [0.375, 0.625]


def test_groups_of_a_pool_are_ranked_together() -> None:
    scores = {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([2.0, 3.0]), "c": torch.tensor([100.0, 99.0])}
    own = within(scores, {"a": "x", "b": "x", "c": "y"})
    assert {name: values.tolist() for name, values in own.items()} == {
        "a": [0.125, 0.875], "b": [0.375, 0.625], "c": [0.75, 0.25],
    }  # fmt: skip


def test_relative_is_in_units_of_the_mean() -> None:
    assert relative(torch.tensor([1.0, 3.0])).tolist() == [0.5, 1.5]
    assert relative(torch.tensor([0.0, 0.0])).tolist() == [0.0, 0.0]


def test_a_step_of_one_group_is_given_up_for_one_of_another_where_that_is_nearer() -> None:
    pools = [Pool("a", torch.tensor([3.0, 2.0, 1.0, 0.5]), 1, 1), Pool("b", torch.tensor([1.0, 0.4, 0.3]), 1, 1)]

    def cost(kept: Mapping[str, int]) -> float:
        return 10.0 * kept["a"] + 7.0 * kept["b"]

    # 3 and 1 cost 37, and no unit fits in besides; 2 and 3 cost 41, 4 and 1 47.
    assert filled(pools, {"a": 3, "b": 1}, cost, 42.0) == {"a": 3, "b": 1}
    assert nearer(pools, {"a": 3, "b": 1}, cost, 42.0) == {"a": 3, "b": 1}  # one step each: 34
    assert nearer(pools, {"a": 2, "b": 2}, cost, 37.0) == {"a": 3, "b": 1}  # 34 before, 37 behind
    assert nearer(pools, {"a": 2, "b": 2}, cost, 34.5) == {"a": 2, "b": 2}  # near enough
