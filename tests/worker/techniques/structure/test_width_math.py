"""The largest multiplier within a limit, and the search for one a kind, held against all there are."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from math import inf, prod

import pytest
import torch

from worker.techniques.structure.units_math import Pool
from worker.techniques.structure.width_math import Counts, Evolution, kept, kinds, start_of, widest

SIZES = {"a": (24, 8, "one"), "b": (24, 8, "one"), "c": (40, 8, "two"), "d": (6, 1, "heads"), "e": (30, 1, "three")}


def pools(least: float = 0.0) -> list[Pool]:
    return [
        Pool(name, torch.arange(units, dtype=torch.float64), max(1, round(least * units)), step, tie)
        for name, (units, step, tie) in SIZES.items()
    ]


def cost(counts: Mapping[str, int]) -> float:
    """Of a row of layers."""
    return float(sum(counts[a] * counts[b] for a, b in itertools.pairwise(sorted(counts))))


def never(_: float) -> bool:
    return False


def multiples(units: int, step: int, share: float) -> int:
    """The multiple nearest to a share of the units, one at least; of two as near that which Python rounds to."""
    near = min((abs(share * units / step - count), count % 2, count) for count in range(units // step + 2))
    return min(units, max(1, near[2]) * step)


@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 0.61, 0.75, 0.9, 0.99])
def test_each_group_keeps_the_nearest_multiple(share: float) -> None:
    expected = {name: multiples(units, step, share) for name, (units, step, _) in SIZES.items()}
    assert kept(pools(), share) == expected


@pytest.mark.parametrize("limit", [0.08, 0.2, 0.37, 0.5, 0.75, 0.95])
def test_the_widest_is_the_largest_of_a_fine_row_that_fits(limit: float) -> None:
    whole = cost(kept(pools(), 1.0))
    row = [place / 10_000 for place in range(1, 10_001)]
    best = max((share for share in row if cost(kept(pools(), share)) <= limit * whole), default=None)
    found = widest(pools(), cost, limit * whole, 0.01, never)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert kept(pools(), found) == kept(pools(), best)


def test_what_the_smallest_exceeds_is_out_of_reach() -> None:
    whole = cost(kept(pools(), 1.0))
    assert widest(pools(0.5), cost, 0.1 * whole, 0.5, never) is None


def test_what_is_near_ends_the_bisection() -> None:
    asked: list[float] = []

    def counted(counts: Mapping[str, int]) -> float:
        asked.append(cost(counts))
        return asked[-1]

    whole = cost(kept(pools(), 1.0))
    found = widest(pools(), counted, 0.5 * whole, 0.1, lambda has: has >= 0.25 * whole)
    assert found is not None
    assert 0.25 * whole <= cost(kept(pools(), found)) <= 0.5 * whole
    assert len(asked) < 6


def test_groups_of_a_kind_share_multipliers_of_which_no_two_are_alike() -> None:
    found = kinds(pools(), 0.53, 0.3)
    assert [[pool.name for pool in kind.pools] for kind in found] == [["a", "b"], ["c"], ["d"], ["e"]]
    for kind in found:
        assert list(kind.shares) == sorted(kind.shares)
        counts = [tuple(kept(kind.pools, share).values()) for share in kind.shares]
        assert len(set(counts)) == len(counts)
        assert counts[-1] == tuple(pool.units for pool in kind.pools)
        assert kept(kind.pools, kind.shares[kind.place(0.53)]) == kept(kind.pools, 0.53)
    assert found[0].shares == (0.3, 0.7, 1.0)  # 8, 16 and 24 of 24


def target(counts: Mapping[str, int]) -> float:
    """Least where some kinds are wide and others narrow, and of no two alike."""
    weights = {"a": 1.0, "b": 0.3, "c": 7.0, "d": 11.0, "e": 0.2}
    return sum(weights[name] * (1 - own / SIZES[name][0]) ** 2 for name, own in counts.items())


def searched(tries: int, limit: float = 0.4, seed: int = 0) -> tuple[Evolution, list[Counts], float, Counts]:
    """The search, what it asked for, the score of the uniform multiplier, and the best."""
    whole = cost(kept(pools(), 1.0))
    uniform = widest(pools(), cost, limit * whole, 0.1, never)
    assert uniform is not None
    own = kinds(pools(), uniform, 0.1)
    search, asked = Evolution(own, cost, limit * whole, seed), []

    def score(counts: Counts) -> float:
        asked.append(counts)
        return target(counts)

    best = search.run(start_of(own, uniform), score, tries)
    return search, asked, target(kept(pools(), uniform)), search.counts(best)


def brute_force(limit: float) -> float:
    """The least score of all that there are within the limit, counted apart."""
    whole = cost(kept(pools(), 1.0))
    uniform = widest(pools(), cost, limit * whole, 0.1, never)
    shares = [tenths / 10 for tenths in range(1, 11)] + [uniform or 1.0]
    best = inf
    for one, two, heads, three in itertools.product(shares, repeat=4):
        own = {"a": one, "b": one, "c": two, "d": heads, "e": three}
        counts = {name: multiples(SIZES[name][0], SIZES[name][1], share) for name, share in own.items()}
        if cost(counts) <= limit * whole:
            best = min(best, target(counts))
    return best


@pytest.mark.parametrize("limit", [0.25, 0.6])
def test_where_all_may_be_tried_there_is_no_better(limit: float) -> None:
    search, asked, _, best = searched(1000, limit)
    assert search.size <= 1000
    assert target(best) == pytest.approx(brute_force(limit), abs=1e-12)
    assert len(asked) == len(search.scores) <= search.size


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_part_of_them_comes_near_and_is_never_worse_than_uniform(seed: int) -> None:
    whole = cost(kept(pools(), 1.0))
    search, asked, uniform, best = searched(40, seed=seed)
    assert len(asked) == len({tuple(own.values()) for own in asked}) <= 40 < search.size
    assert all(cost(own) <= 0.4 * whole for own in asked)
    least = brute_force(0.4)
    assert least <= target(best) <= uniform
    assert target(best) - least <= 0.35 * (uniform - least)


def test_the_same_seed_asks_for_the_same() -> None:
    one, again, other = (searched(30, seed=seed)[1] for seed in (3, 3, 4))
    assert one == again != other


def test_all_but_the_start_are_such_that_nothing_more_fits() -> None:
    whole = cost(kept(pools(), 1.0))
    search, _, _, _ = searched(30)
    sizes = [len(kind.shares) for kind in kinds(pools(), 0.6, 0.1)]
    assert prod(sizes) > 30
    for genome in list(search.scores)[1:]:
        for place in range(len(genome)):
            more = (*genome[:place], genome[place] + 1, *genome[place + 1 :])
            try:
                counts = search.counts(more)
            except IndexError:  # it has all of them
                continue
            assert cost(counts) > 0.4 * whole


def test_what_cannot_be_had_is_not_taken() -> None:
    own = kinds(pools(), 0.5, 0.1)
    search = Evolution(own, cost, cost(kept(pools(), 0.7)), 0)
    start = start_of(own, 0.5)
    best = search.run(start, lambda counts: 1.0 if counts == search.counts(start) else inf, 30)
    assert best == start
