"""Which units go: in what order, and how many of each group stay."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf

import torch
from torch import Tensor

Cost = Callable[[Mapping[str, int]], float]
"""Of so many units of each group."""


@dataclass(frozen=True, eq=False)
class Pool:
    """A group's scores, higher for what is worth more, and how many units may stay: `least` at least, and of numbers
    below all of them multiples of `step`. Groups of one `tie` keep as many as each other."""

    name: str
    scores: Tensor
    least: int
    step: int
    tie: Hashable = None

    @property
    def units(self) -> int:
        return len(self.scores)

    def allowed(self, count: float) -> int:
        """The nearest number that may stay."""
        if count >= self.units:
            return self.units
        least = min(self.units, ceil(self.least / self.step) * self.step)
        return min(self.units, max(least, round(count / self.step) * self.step))

    def above(self, count: int) -> int:
        """The next larger number that may stay."""
        return min(self.units, (count // self.step + 1) * self.step)

    def next_score(self, count: int) -> float:
        """The score of the best unit that does not stay among so many; that of none is the least there is."""
        return -inf if count >= self.units else float(self.scores.sort(descending=True, stable=True).values[count])

    def best(self, count: int) -> Tensor:
        """The places of so many, in order."""
        order = self.scores.sort(descending=True, stable=True).indices
        return order[:count].sort().values


def relative(scores: Tensor) -> Tensor:
    """In units of their mean, by which groups whose weights are of other sizes compare."""
    mean = scores.abs().mean()
    return scores / mean if mean > 0 else scores


def ranks(scores: Sequence[Tensor]) -> list[Tensor]:
    """The place of each in the order of all, between 0 and 1."""
    joined = torch.cat(list(scores))
    order = torch.empty(len(joined), dtype=torch.float64)
    order[joined.sort(stable=True).indices] = (torch.arange(len(joined), dtype=torch.float64) + 0.5) / len(joined)
    return list(order.split([len(own) for own in scores]))


def within(scores: Mapping[str, Tensor], pools: Mapping[str, Hashable]) -> dict[str, Tensor]:
    """Ranks of units among those of groups that share a pool."""
    found: dict[str, Tensor] = {}
    for pool in dict.fromkeys(pools.values()):
        names = [name for name in scores if pools[name] == pool]
        found |= dict(zip(names, ranks([scores[name] for name in names]), strict=True))
    return found


def lowest(pools: Sequence[Pool], count: int) -> dict[str, int]:
    """How many units each group keeps if so many of the lowest scores of all go, as far as they may; of groups that are
    tied as many from each."""
    order = torch.cat([pool.scores.double() for pool in pools]).sort(stable=True).indices[:count]
    owner = torch.repeat_interleave(torch.arange(len(pools)), torch.tensor([pool.units for pool in pools]))
    gone = torch.bincount(owner[order], minlength=len(pools)).tolist()
    found: dict[str, int] = {}
    for tied in _ties(pools):
        mean = sum(own for own, pool in zip(gone, pools, strict=True) if pool in tied) / len(tied)
        found |= {pool.name: pool.allowed(pool.units - mean) for pool in tied}
    return found


def _ties(pools: Sequence[Pool]) -> list[list[Pool]]:
    ties: dict[Hashable, list[Pool]] = {}
    for pool in pools:
        ties.setdefault(pool.name if pool.tie is None else pool.tie, []).append(pool)
    return list(ties.values())


def fitting(pools: Sequence[Pool], cost: Cost, most: float) -> dict[str, int] | None:
    """Of what `lowest` gives the largest that costs no more than `most`, and what still fits in besides; None where
    even the smallest costs more."""
    low, high = 0, sum(pool.units for pool in pools)
    if cost(lowest(pools, high)) > most:
        return None
    while low < high:  # cost falls with the count, as what is kept does
        middle = (low + high) // 2
        if cost(lowest(pools, middle)) <= most:
            high = middle
        else:
            low = middle + 1
    return filled(pools, lowest(pools, high), cost, most)


def filled(pools: Sequence[Pool], kept: Mapping[str, int], cost: Cost, most: float) -> dict[str, int]:
    """With units put back a step of a group at a time, those of the highest scores first, as long as they fit."""
    found = dict(kept)
    waiting = _ties(pools)
    while waiting:
        best = max(waiting, key=lambda tied: max(pool.next_score(found[pool.name]) for pool in tied))
        more = {pool.name: pool.above(found[pool.name]) for pool in best}
        if any(more[name] > found[name] for name in more) and cost({**found, **more}) <= most:
            found |= more
        else:
            waiting.remove(best)
    return found


def descending(
    pools: Sequence[Pool], losses: Mapping[str, Callable[[int], float]], cost: Cost, most: float
) -> dict[str, int] | None:
    """From all units down, each time the step of one group that loses the least for what it saves, until the cost is
    no more than `most`, and then what still fits in; None where it is not even at the end. `losses` are by how many
    units stay."""
    kept = {pool.name: pool.units for pool in pools}
    at = cost(kept)
    while at > most:
        best: tuple[float, str, int, float] | None = None
        for pool in pools:
            now = kept[pool.name]
            fewer = pool.allowed(now - max(pool.step, pool.units // 16))
            if fewer >= now:
                continue
            then = cost({**kept, pool.name: fewer})
            lost = max(0.0, losses[pool.name](fewer) - losses[pool.name](now))
            if then < at and (best is None or lost / (at - then) < best[0]):
                best = lost / (at - then), pool.name, fewer, then
        if best is None:
            return None
        _, name, kept[name], at = best
    return filled(pools, kept, cost, most)
