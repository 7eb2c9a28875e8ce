"""Which units go: in what order, and how many of each group stay."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf

import torch
from torch import Tensor

NEAR = 0.02  # of a limit, below which a cost is not what was asked for
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
        return best(self.scores, count)


def best(scores: Tensor, count: int) -> Tensor:
    """The places of so many of the highest scores, in order."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


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
    for tied in ties(pools):
        mean = sum(own for own, pool in zip(gone, pools, strict=True) if pool in tied) / len(tied)
        found |= {pool.name: pool.allowed(pool.units - mean) for pool in tied}
    return found


def ties(pools: Sequence[Pool]) -> list[list[Pool]]:
    """Pools that keep as many as each other, in the order of the first of each."""
    ties: dict[Hashable, list[Pool]] = {}
    for pool in pools:
        ties.setdefault(pool.name if pool.tie is None else pool.tie, []).append(pool)
    return list(ties.values())


def fitting(pools: Sequence[Pool], cost: Cost, most: float) -> dict[str, int] | None:
    """Of what `lowest` gives the largest that costs no more than `most`, and what still fits in besides; None where
    even the smallest costs more."""
    if not pools:
        return {} if cost({}) <= most else None
    low, high = 0, sum(pool.units for pool in pools)
    if cost(lowest(pools, high)) > most:
        return None
    while low < high:  # cost falls with the count, as what is kept does
        middle = (low + high) // 2
        if cost(lowest(pools, middle)) <= most:
            high = middle
        else:
            low = middle + 1
    return nearer(pools, filled(pools, lowest(pools, high), cost, most), cost, most)


def filled(pools: Sequence[Pool], kept: Mapping[str, int], cost: Cost, most: float) -> dict[str, int]:
    """With units put back a step of a group at a time, those of the highest scores first, as long as they fit."""
    found = dict(kept)
    waiting = ties(pools)
    while waiting:
        best = max(waiting, key=lambda tied: max(pool.next_score(found[pool.name]) for pool in tied))
        more = {pool.name: pool.above(found[pool.name]) for pool in best}
        if any(more[name] > found[name] for name in more) and cost({**found, **more}) <= most:
            found |= more
        else:
            waiting.remove(best)
    return found


def nearer(pools: Sequence[Pool], kept: Mapping[str, int], cost: Cost, most: float) -> dict[str, int]:
    """With a step of one group given up for one of another, as long as that brings a cost that is further than NEAR
    below `most` nearer to it: the pair that loses the least by scores of those that bring it near, or the nearest."""
    found, at = dict(kept), cost(kept)
    while at < (1 - NEAR) * most:
        ways = []
        for more, less in itertools.permutations(ties(pools), 2):
            other = {**found, **{pool.name: pool.above(found[pool.name]) for pool in more}}
            other |= {pool.name: pool.allowed(found[pool.name] - pool.step) for pool in less}
            has = cost(other)
            if at < has <= most:
                ways.append((has < (1 - NEAR) * most, _lost(pools, found, other), -has, other))
        if not ways:
            break
        _, _, has, best = min(ways, key=lambda way: (way[0], way[2] if way[0] else way[1]))
        found, at = best, -has
    return found


def _lost(pools: Sequence[Pool], before: Mapping[str, int], after: Mapping[str, int]) -> float:
    """The scores of units that no longer stay, without those of units that now do."""
    kept = [pool.scores.sort(descending=True).values.double().cumsum(0) for pool in pools]
    return sum(
        float(own[before[pool.name] - 1] - own[after[pool.name] - 1]) for own, pool in zip(kept, pools, strict=True)
    )


def descending(
    pools: Sequence[Pool], losses: Mapping[str, Callable[[int], float]], cost: Cost, most: float
) -> dict[str, int] | None:
    """From all units down, each time the step of one group that loses the least for what it saves, until the cost is
    no more than `most`, and then what still fits in; None where it is not even at the end. `losses` are by how many
    units stay."""
    kept = {pool.name: pool.units for pool in pools}
    at = cost(kept)
    while at > most:
        least: tuple[float, str, int, float] | None = None
        for pool in pools:
            now = kept[pool.name]
            fewer, then = _fewer(pool, kept, cost, at)
            lost = max(0.0, losses[pool.name](fewer) - losses[pool.name](now))
            if then < at and (least is None or lost / (at - then) < least[0]):
                least = lost / (at - then), pool.name, fewer, then
        if least is None:
            return None
        _, name, kept[name], at = least
    return nearer(pools, filled(pools, kept, cost, most), cost, most)


def _fewer(pool: Pool, kept: Mapping[str, int], cost: Cost, at: float) -> tuple[int, float]:
    """The next smaller number of units that costs less, and what it costs: of channels that a processor computes in
    blocks a few less may cost the same. What is now where none does."""
    now = fewer = kept[pool.name]
    for steps in itertools.count(1):
        before, fewer = fewer, pool.allowed(now - steps * max(pool.step, pool.units // 16))
        if fewer >= before:
            break
        then = cost({**kept, pool.name: fewer})
        if then < at:
            return fewer, then
    return now, at
