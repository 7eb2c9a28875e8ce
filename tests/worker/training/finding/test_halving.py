"""Rounds of a race: what they cost, how they grow, and who goes on."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from worker.training.finding.halving import Round, rounds, survivors


def test_a_race_of_eighteen_by_hand() -> None:
    # 36,000 samples in three shares of 12,000: 18 x 666, 6 x 2,000, 2 x 6,000.
    assert rounds(36_000, 18, 640, 18_000) == [Round(18, 666), Round(6, 2000), Round(2, 6000)]


@pytest.mark.parametrize("candidates", range(2, 30))
@pytest.mark.parametrize("budget", [100, 999, 50_000])
def test_a_race_keeps_to_its_budget_and_gives_each_enough(candidates: int, budget: int) -> None:
    plan = rounds(budget, candidates, 40, 10**9)
    assert sum(one.candidates * one.samples for one in plan) <= budget
    assert all(one.samples >= 40 for one in plan)
    assert all(b.candidates == math.ceil(a.candidates / 3) for a, b in pairwise(plan))
    assert all(b.samples > a.samples for a, b in pairwise(plan))


def test_fewer_begin_where_the_budget_is_short() -> None:
    assert rounds(3000, 18, 640, 10**9)[0].samples >= 640
    assert rounds(1000, 18, 640, 10**9) == []


def test_nobody_is_trained_for_longer_than_the_training() -> None:
    assert rounds(10**9, 3, 1, 500) == [Round(3, 500)]


def test_the_second_number_decides_among_equals() -> None:
    assert survivors([(0.9, -0.5), (0.8, -0.1), (0.9, -0.4), (-math.inf, -math.inf)], 3) == [2, 0, 1]


def test_of_those_that_are_alike_one_goes_on() -> None:
    scores = [(0.9, 0.0), (0.89, 0.0), (0.5, 0.0), (0.4, 0.0)]
    alike = [[i == j or {i, j} == {0, 1} for j in range(4)] for i in range(4)]
    assert survivors(scores, 2, alike) == [0, 2]
    assert survivors(scores, 4, alike) == [0, 1, 2, 3]  # where there are no others, they do
    assert survivors(scores, 2) == [0, 1]
