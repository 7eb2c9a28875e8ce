"""Successive halving as arithmetic: how many candidates begin, how long each round is, who goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FACTOR = 3


@dataclass(frozen=True)
class Round:
    """Each of `candidates` is trained for `samples` samples, from the beginning and with its whole schedule."""

    candidates: int
    samples: int


def rounds(budget: int, candidates: int, least: int, most: int) -> list[Round]:
    """Rounds that cost `budget` samples in all, in equal shares (Jamieson & Talwalkar 2016).

    Each has a third of the candidates of the one before, for three times as long. Begins with at most `candidates`, and
    with fewer where a share would leave each less than `least` samples; nobody is trained for more than `most`. Empty
    where the budget allows not even two candidates `least` samples.
    """
    for count in range(candidates, 1, -1):
        plan = _planned(budget, count, most)
        if plan[0].samples >= least:
            return plan
    return []


def _planned(budget: int, candidates: int, most: int) -> list[Round]:
    sizes = [candidates]
    while sizes[-1] > FACTOR:
        sizes.append(-(-sizes[-1] // FACTOR))
    share = budget / len(sizes)
    return [Round(count, min(most, int(share / count))) for count in sizes]


def survivors(
    scores: Sequence[tuple[float, float]], count: int, alike: Sequence[Sequence[bool]] | None = None
) -> list[int]:
    """The `count` best, by their first number and, among equals, their second; larger is better. Best first.

    Of those that are `alike` one goes on, while there are others: short trainings flatter bold rates, and all of one
    kind may be wrong together.
    """
    order = sorted(range(len(scores)), key=lambda i: scores[i], reverse=True)
    chosen: list[int] = []
    for i in order:
        if alike is None or not any(alike[i][j] for j in chosen):
            chosen.append(i)
    chosen = chosen[:count]
    rest = [i for i in order if i not in chosen][: count - len(chosen)]
    return sorted(chosen + rest, key=order.index)
