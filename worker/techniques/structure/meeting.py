"""Choices whose cost is only an estimate, brought within a limit by what a few of them really cost."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TypeVar

from worker.techniques.structure.unit_limits import LATENCY, UnitLimit

CORRECTIONS = 6  # of a cost by arithmetic towards the one that is counted
CLOSE = 0.002  # of the whole, by which the two differ where no correction brings more
CENTRE = {False: 0.999, True: 0.97}  # of a limit, what a correction aims at; a time is never the same twice

Chosen = TypeVar("Chosen")


def met(
    limit: UnitLimit,
    find: Callable[[float], Chosen],
    estimated: Callable[[Chosen], float],
    real: Callable[[Chosen], float],
) -> tuple[float, Chosen] | None:
    """What it really costs, and the choice that has the most of those that were found to be within the limit; None
    where none was.

    `find` gives the best that is estimated to cost no more than so much, or the smallest where none is. Where it really
    costs something else, another is looked for, between an aim that was met and one that was not.
    """
    best: tuple[float, Chosen] | None = None
    last: tuple[Chosen, float] | None = None
    aim, low, high = limit.most, 0.0, inf
    for _ in range(CORRECTIONS):
        choice = find(aim)
        if last is None or choice != last[0]:
            last = choice, real(choice)
        told, has = estimated(choice), last[1]
        if has <= limit.most and (best is None or has > best[0]):
            best = has, choice
        if limit.is_met(has) or (has <= limit.most and abs(has - told) <= CLOSE * limit.whole):
            break
        low, high = (max(low, aim), high) if has <= limit.most else (low, min(high, aim))
        # Of the smallest that there is, as estimated, where that is more than was aimed at.
        aim = max(aim, told) * CENTRE[limit.measure == LATENCY] * limit.most / has
        if not low < aim < high:
            aim = (low + high) / 2 if high < inf else 2 * low
    return best
