"""Width multipliers: the largest one within a limit, and an evolutionary search for one a kind of layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf, prod
from random import Random

from worker.techniques.structure.units_math import Cost, Pool, ties

GRID = tuple(tenths / 10 for tenths in range(1, 11))  # multipliers that a search chooses from
FINE = 10_000  # of multipliers in a row: between two lies no unit of 8 in as many as 80,000
PARENTS = 8  # the best so far, of which others are made
FIRST = 4  # of so many one candidate is drawn at random, before there are parents
TRIED_AGAIN = 200  # children in a row that are known by then: there is hardly another

Genome = tuple[int, ...]
"""For each kind the place of its multiplier."""
Counts = dict[str, int]


@dataclass(frozen=True)
class Kind:
    """Groups that share a multiplier, of which each keeps so many units by each of the `shares`, in ascending order."""

    pools: tuple[Pool, ...]
    shares: tuple[float, ...]

    def place(self, share: float) -> int:
        """Of the multiplier that keeps as many units as this one."""
        return next(place for place, own in enumerate(self.shares) if kept(self.pools, own) == kept(self.pools, share))


def kept(pools: Sequence[Pool], share: float) -> Counts:
    """How many units each group keeps of its own by one multiplier."""
    return {pool.name: pool.allowed(share * pool.units) for pool in pools}


def kinds(pools: Sequence[Pool], uniform: float, least: float) -> list[Kind]:
    """With multipliers of the grid that are `least` at least, and the uniform one, of which no two keep as many."""
    found = []
    for tied in ties(pools):
        shares: dict[tuple[int, ...], list[float]] = {}
        for share in sorted({uniform, *(own for own in GRID if own >= least)}):
            shares.setdefault(tuple(kept(tied, share).values()), []).append(share)
        units = sum(pool.units for pool in tied)
        nearest = (min(own, key=lambda share: abs(share * units - sum(counts))) for counts, own in shares.items())
        found.append(Kind(tuple(tied), tuple(nearest)))
    return found


def widest(pools: Sequence[Pool], cost: Cost, most: float, least: float, near: Callable[[float], bool]) -> float | None:
    """The largest multiplier, one for all, of four digits, `least` or more, that costs no more than `most`, or the
    first that is found whose cost is `near`; None where the smallest costs more. By bisection: more units cost more."""
    told: dict[tuple[int, ...], float] = {}

    def costs(place: int) -> float:
        counts = kept(pools, place / FINE)
        key = tuple(counts.values())
        if key not in told:
            told[key] = cost(counts)
        return told[key]

    low, high = max(1, ceil(least * FINE)), FINE
    if costs(low) > most:
        return None
    while high - low > 1 and not near(costs(low)):
        middle = (low + high) // 2
        low, high = (middle, high) if costs(middle) <= most else (low, middle)
    return low / FINE


class Evolution:
    """A search for the multipliers, one a kind, within a limit that score least (Cai et al. 2020; Liu et al. 2019).

    Candidates are drawn at random, and then made of the best so far: one with some multipliers changed, or two mixed.
    Each gives up multipliers drawn by lot until it is within the limit, and takes up what still fits in: only of
    those that leave nothing unused the scores are asked. `cost` is taken to grow with each multiplier.
    """

    def __init__(self, kinds: Sequence[Kind], cost: Cost, most: float, seed: int) -> None:
        self._kinds, self._cost, self._most = kinds, cost, most
        self._random = Random(seed)  # noqa: S311 - draws candidates, hides nothing
        self.scores: dict[Genome, float] = {}

    def run(self, start: Genome, score: Callable[[Counts], float], tries: int) -> Genome:
        """The best of at most so many that are scored, among them `start`, which is within the limit; of all there are,
        where these are no more. An infinite score is that of one that cannot be had."""
        self.scores = {start: score(self.counts(start))}
        for genome in self._all() if self.size <= tries else self._bred(tries):
            if genome not in self.scores:
                self.scores[genome] = score(self.counts(genome))
        return min(self.scores, key=lambda genome: self.scores[genome])

    @property
    def size(self) -> int:
        """How many sets of multipliers there are."""
        return prod(len(kind.shares) for kind in self._kinds)

    def counts(self, genome: Genome) -> Counts:
        """How many units each group keeps."""
        found: Counts = {}
        for kind, place in zip(self._kinds, genome, strict=True):
            found |= kept(kind.pools, kind.shares[place])
        return found

    def shares(self, genome: Genome) -> list[float]:
        """Of each kind its multiplier."""
        return [kind.shares[place] for kind, place in zip(self._kinds, genome, strict=True)]

    def _fits(self, genome: Genome) -> bool:
        return self._cost(self.counts(genome)) <= self._most

    def _all(self) -> Iterator[Genome]:
        places = itertools.product(*(range(len(kind.shares)) for kind in self._kinds))
        return (genome for genome in places if self._fits(genome))

    def _bred(self, tries: int) -> Iterator[Genome]:
        """Until there are enough, or hardly another is left. Raises nothing where none but the start fits."""
        again = 0
        while len(self.scores) < tries and again < TRIED_AGAIN:
            genome = self._mended(self._drawn() if len(self.scores) <= tries // FIRST else self._child())
            if genome is None or genome in self.scores:
                again += 1
                continue
            again = 0
            yield genome

    def _drawn(self) -> Genome:
        return tuple(self._random.randrange(len(kind.shares)) for kind in self._kinds)

    def _child(self) -> Genome:
        ranked = sorted((own for own, score in self.scores.items() if score < inf), key=lambda own: self.scores[own])
        parents = ranked[:PARENTS]
        first, second = self._random.choice(parents), self._random.choice(parents)
        if self._random.random() < 0.5:
            return tuple(self._random.choice(pair) for pair in zip(first, second, strict=True))
        drawn, changed = self._drawn(), self._random.randrange(len(first))
        # One for sure, and each other as often as one of them.
        return tuple(
            drawn[place] if place == changed or self._random.random() < 1 / len(first) else own
            for place, own in enumerate(first)
        )

    def _mended(self, genome: Genome) -> Genome | None:
        """Within the limit, where one that is smaller in each kind is, and with nothing unused."""
        while not self._fits(genome):
            larger = [place for place, own in enumerate(genome) if own > 0]
            if not larger:
                return None
            genome = _moved(genome, self._random.choice(larger), -1)
        waiting = [place for place, kind in enumerate(self._kinds) if genome[place] < len(kind.shares) - 1]
        while waiting:
            place = self._random.choice(waiting)
            more = _moved(genome, place, 1)
            if self._fits(more):
                genome = more
            if genome is not more or genome[place] == len(self._kinds[place].shares) - 1:
                waiting.remove(place)
        return genome


def _moved(genome: Genome, place: int, by: int) -> Genome:
    return (*genome[:place], genome[place] + by, *genome[place + 1 :])


def start_of(kinds: Sequence[Kind], share: float) -> Genome:
    """One multiplier for all."""
    return tuple(kind.place(share) for kind in kinds)


def by_group(kinds: Sequence[Kind], shares: Sequence[float]) -> Mapping[str, float]:
    """Of each group the multiplier of its kind."""
    return {pool.name: share for kind, share in zip(kinds, shares, strict=True) for pool in kind.pools}
