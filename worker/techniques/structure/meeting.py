"""Choices whose cost is only an estimate, brought within a limit by what a few of them really cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any

from worker.techniques.structure.unit_limits import LATENCY, UnitLimit

CORRECTIONS = 6  # of a cost by arithmetic towards the one that is counted
CLOSE = 0.002  # of the whole, by which the two differ where no correction brings more
CENTRE = {False: 0.999, True: 0.97}  # of a limit, what a correction aims at; a time is never the same twice
HALVINGS = 6  # of what differs between a choice within the limit and one that is not

Choice = Mapping[Any, int]
"""By a part's name how much of it stays, or which of its options is taken."""


def met(
    limit: UnitLimit,
    find: Callable[[float], Choice],
    estimated: Callable[[Choice], float],
    real: Callable[[Choice], float],
    mixes: bool = True,
) -> tuple[float, Choice] | None:
    """What it really costs, and the choice that has the most of those that were found to be within the limit; None
    where none was.

    `find` gives the best that is estimated to cost no more than so much, or the smallest where none is. Where it really
    costs something else, another is looked for, between an aim that was met and one that was not; and where estimates
    leave out what lies between two choices, one that is in part like either, if it `mixes` them.
    """
    tried: list[tuple[float, Choice]] = []
    aim, low, high = limit.most, 0.0, inf
    for _ in range(CORRECTIONS):
        choice = find(aim)
        if not tried or choice != tried[-1][1]:
            tried.append((real(choice), choice))
        told, has = estimated(choice), tried[-1][0]
        if limit.is_met(has) or (has <= limit.most and abs(has - told) <= CLOSE * limit.whole):
            break
        low, high = (max(low, aim), high) if has <= limit.most else (low, min(high, aim))
        # Of the smallest that there is, as estimated, where that is more than was aimed at.
        aim = max(aim, told) * CENTRE[limit.measure == LATENCY] * limit.most / has
        if not low < aim < high:
            aim = (low + high) / 2 if high < inf else 2 * low
    if mixes:
        tried += _between(limit, tried, real)
    return max((own for own in tried if own[0] <= limit.most), key=_cost, default=None)


def _between(
    limit: UnitLimit, tried: list[tuple[float, Choice]], real: Callable[[Choice], float]
) -> list[tuple[float, Choice]]:
    """Choices between the best that is within the limit, where that is not near, and the cheapest that is not."""
    inside = max((own for own in tried if own[0] <= limit.most), key=_cost, default=None)
    outside = min((own for own in tried if own[0] > limit.most), key=_cost, default=None)
    found: list[tuple[float, Choice]] = []
    if inside is None or outside is None or limit.is_near(inside[0]):
        return found
    small, large = inside[1], outside[1]
    for _ in range(HALVINGS):
        middle = halfway(small, large)
        if middle is None or (found and limit.is_near(found[-1][0])):
            break
        found.append((real(middle), middle))
        small, large = (middle, large) if found[-1][0] <= limit.most else (small, middle)
    return found


def halfway(one: Choice, other: Choice) -> Choice | None:
    """Like the other in every second part in which they differ; None where no more than one does."""
    differ = [name for name in one if one[name] != other[name]]
    return {**one, **{name: other[name] for name in differ[::2]}} if len(differ) > 1 else None


def _cost(tried: tuple[float, Choice]) -> float:
    return tried[0]
