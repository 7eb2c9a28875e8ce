"""Which units stay, so that a budget is met: by scores, or by what was measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor, nn

from app.contract.errors import InvalidSpec
from app.contract.structured import StructuredPrune
from app.contract.widths import TakesUnits
from worker.context import Context
from worker.structure.groups import Group, Structure
from worker.structure.sound import without
from worker.techniques.pruning.sensitivity import drift
from worker.techniques.structure.costs import Counts
from worker.techniques.structure.importance import scores
from worker.techniques.structure.meeting import met
from worker.techniques.structure.multiples import ladder
from worker.techniques.structure.statistics import Statistics, running
from worker.techniques.structure.unit_limits import UNITS, UnitLimit
from worker.techniques.structure.units_math import Cost, Pool, best, descending, fitting, relative, within

LEVELS = (0.25, 0.5, 0.75)  # shares of a group's units without which the outputs are looked at

Stay = dict[str, Tensor]
"""By a group's name the places of units that stay."""
Losses = Mapping[str, Callable[[int], float]]
"""By a group's name what is lost, by how many units stay."""


def chosen(
    step: StructuredPrune,
    context: Context,
    structure: Structure,
    groups: Sequence[Group],
    limit: UnitLimit,
    least: Mapping[str, int],
) -> Stay:
    """What stays of each group, of which `least` at least. Raises InvalidSpec, with what is reachable, for a limit that
    none is within."""
    own = scores(step, context, groups)
    groups = [group for group in groups if group.name in own]
    own = _compared(step, groups, own)
    cost = limit.cost(context, groups)
    losses = _losses(step, context, groups, own) if step.scope == "auto" else None

    known: dict[tuple[int, ...], float] = {}

    def real(stay: Mapping[str, Tensor]) -> float:
        """What these units really cost: how many, of each group the best, says which."""
        counts = tuple(map(len, stay.values()))
        if counts not in known:
            counted = limit.measure == UNITS
            made = context.model.module if counted else without(context.model.module, structure, groups, stay)[0]
            known[counts] = float(sum(counts)) if counted else limit.real(context, made)
        return known[counts]

    tried = []
    for multiples in ladder(step, groups):
        pools = [_pool(step, group, own[group.name], least, multiples) for group in groups]
        tried.append(_nearest(limit, pools, losses, cost, real))
        if limit.is_near(tried[-1][0]):
            return tried[-1][1]
    within_limit = [one for one in tried if one[0] <= limit.most]
    for has, stay in within_limit:  # of those that are as good the coarsest
        if has >= (1 - limit.near) * max(within_limit, key=itemgetter(0))[0]:
            return stay
    has = min(tried, key=itemgetter(0))[0]
    raise InvalidSpec(
        f"With the fewest units that every group may keep {has / limit.whole:.1%} of the {limit.measure} are left, "
        f"and {limit.share:.1%} are asked for. Give a larger budget, a smaller keep_at_least, or exclude fewer layers."
    )


def _nearest(
    limit: UnitLimit, pools: Sequence[Pool], losses: Losses | None, cost: Cost, real: Callable[[Stay], float]
) -> tuple[float, Stay]:
    """What stays so that the limit is met as nearly as it can be, or the fewest units; and what these really cost."""
    smallest = {pool.name: pool.allowed(0) for pool in pools}

    def find(most: float) -> dict[str, int]:
        found = fitting(pools, cost, most) if losses is None else descending(pools, losses, cost, most)
        return found or smallest

    # Groups that lose the same share are not to lose much and nothing in turns.
    mixes = all(pool.tie is None for pool in pools)
    found = met(limit, find, cost, lambda counts: real(_stay(pools, counts)), mixes)
    if found is not None:
        return found[0], _stay(pools, found[1])
    return real(_stay(pools, smallest)), _stay(pools, smallest)


def _stay(pools: Sequence[Pool], counts: Counts) -> Stay:
    return {pool.name: pool.best(counts[pool.name]) for pool in pools}


def _compared(step: StructuredPrune, groups: Sequence[Group], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores that a unit's may be held against."""
    own = {name: relative(values) for name, values in own.items()}
    if step.scope == "local":
        return within(own, {group.name: group.name for group in groups})
    if step.scope == "isomorphic":
        return within(own, {group.name: group.pattern for group in groups})
    return own


def _pool(
    step: StructuredPrune, group: Group, scores: Tensor, least: Mapping[str, int], multiples: Mapping[str, int]
) -> Pool:
    tie = group.pattern if step.scope == "local" else None
    return Pool(group.name, scores, least[group.name], multiples[group.name], tie)


def _losses(step: StructuredPrune, context: Context, groups: Sequence[Group], own: Mapping[str, Tensor]) -> Losses:
    """By how many units stay: how far the outputs are from what they were, where nobody reads the others and batch
    norms have found their statistics again. With the old ones whatever goes seems to cost all there is."""
    statistics, module = Statistics(context, step.samples), context.model.module
    found = {}
    with _as_it_is(module):
        statistics.of(module)
        told = drift(context, step.samples, "Scope auto looks at outputs for data")
        for place, group in enumerate(groups):
            counts, lost = [group.units], [0.0]
            for level in LEVELS:
                count = max(1, round((1 - level) * group.units))
                if count < counts[-1]:
                    gone = torch.ones(group.units, dtype=torch.bool)
                    gone[best(own[group.name], count)] = False
                    with _unread(module, group, gone):
                        statistics.of(module)
                        counts.append(count)
                        lost.append(max(lost[-1], told()))
            # Without any there is nothing left of what the group says: taken to go on as it did.
            counts.append(0)
            lost.append(2 * lost[-1] if len(lost) > 1 else 1.0)
            found[group.name] = _curve(counts, lost)
            context.progress(0.1 * (place + 1) / len(groups))
    return found


def _curve(counts: Sequence[int], lost: Sequence[float]) -> Callable[[int], float]:
    at, values = list(counts)[::-1], list(lost)[::-1]
    return lambda count: float(np.interp(count, at, values))


@contextmanager
def _unread(module: nn.Module, group: Group, gone: Tensor) -> Iterator[None]:
    """Within it nobody reads what is gone; behind it the network is what it was."""
    readers = [cut for cut in group.cuts if not cut.made]
    with _as_it_is(module, {cut.parameter for cut in readers}), torch.no_grad():
        for cut in readers:
            tensor = module.get_parameter(cut.parameter)
            tensor.index_fill_(cut.dim, cut.places[gone].reshape(-1).to(tensor.device), 0.0)
        yield


@contextmanager
def _as_it_is(module: nn.Module, parameters: Collection[str] = ()) -> Iterator[None]:
    """Behind it these and the statistics of batch norms are what they were."""
    tensors = {name: module.get_parameter(name) for name in parameters} | running(module)
    before = {name: own.detach().clone() for name, own in tensors.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, values in before.items():
                tensors[name].copy_(values)


def least_of(step: TakesUnits, groups: Sequence[Group]) -> dict[str, int]:
    """How many units every group keeps whatever is asked for."""
    return {group.name: max(1, ceil(step.keep_at_least * group.units - 1e-9)) for group in groups}
