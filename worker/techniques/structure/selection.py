"""Which units stay, so that a budget is met: by scores, or by what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil

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
from worker.techniques.structure.unit_limits import UNITS, UnitLimit
from worker.techniques.structure.units_math import Cost, Pool, descending, fitting, relative, within

LEVELS = (0.25, 0.5, 0.75)  # shares of a group's units without which the outputs are looked at

Finder = Callable[[Cost, float], "dict[str, int] | None"]
"""What costs no more than so much."""


def chosen(
    step: StructuredPrune,
    context: Context,
    structure: Structure,
    groups: Sequence[Group],
    limit: UnitLimit,
    least: Mapping[str, int],
) -> dict[str, Tensor]:
    """What stays of each group, of which `least` at least. Raises InvalidSpec, with what is reachable, for a limit that
    none is within."""
    own = scores(step, context, groups)
    groups = [group for group in groups if group.name in own]
    pools = _pools(step, groups, own, least)
    find = _finder(step, context, groups, pools)

    def real(counts: Counts) -> float:
        """What so many units really cost; units are what they are."""
        if limit.measure == UNITS:
            return float(sum(counts.values()))
        return limit.real(context, without(context.model.module, structure, groups, _stay(pools, counts))[0])

    cost = limit.cost(context, groups)
    smallest = {pool.name: pool.allowed(0) for pool in pools}
    counts = met(limit, lambda most: find(cost, most) or smallest, cost, real)
    if counts is not None:
        return _stay(pools, counts)
    has = real(smallest)
    raise InvalidSpec(
        f"With the fewest units that every group may keep {has / limit.whole:.1%} of the {limit.measure} are left, "
        f"and {limit.share:.1%} are asked for. Give a larger budget, a smaller keep_at_least, or exclude fewer layers."
    )


def _stay(pools: Sequence[Pool], counts: Counts) -> dict[str, Tensor]:
    return {pool.name: pool.best(counts[pool.name]) for pool in pools}


def _pools(
    step: StructuredPrune, groups: Sequence[Group], own: Mapping[str, Tensor], least: Mapping[str, int]
) -> list[Pool]:
    own = {name: relative(values) for name, values in own.items()}
    if step.scope == "local":
        own = within(own, {group.name: group.name for group in groups})
    elif step.scope == "isomorphic":
        own = within(own, {group.name: group.pattern for group in groups})
    return [
        Pool(
            group.name,
            own[group.name],
            least[group.name],
            1 if group.in_blocks else min(step.round_to, group.units),
            group.pattern if step.scope == "local" else None,
        )
        for group in groups
    ]


def _finder(step: StructuredPrune, context: Context, groups: Sequence[Group], pools: Sequence[Pool]) -> Finder:
    if step.scope != "auto":
        return lambda cost, most: fitting(pools, cost, most)
    losses = _losses(step, context, groups, pools)
    return lambda cost, most: descending(pools, losses, cost, most)


def _losses(
    step: StructuredPrune, context: Context, groups: Sequence[Group], pools: Sequence[Pool]
) -> dict[str, Callable[[int], float]]:
    """By how many units stay: how far the outputs are from what they were, where nobody reads the others."""
    told = drift(context, step.samples, "Scope auto looks at outputs for data")
    found: dict[str, Callable[[int], float]] = {}
    for place, (group, pool) in enumerate(zip(groups, pools, strict=True)):
        counts, lost = [group.units], [0.0]
        for level in LEVELS:
            count = max(1, round((1 - level) * group.units))
            if count < counts[-1]:
                gone = torch.ones(group.units, dtype=torch.bool)
                gone[pool.best(count)] = False
                counts.append(count)
                lost.append(max(lost[-1], _unread(context.model.module, group, gone, told)))
        # Without any there is nothing left of what the group says: taken to go on as it did.
        counts.append(0)
        lost.append(2 * lost[-1] if len(lost) > 1 else 1.0)
        found[group.name] = _curve(counts, lost)
        context.progress(0.1 * (place + 1) / len(groups))
    return found


def _curve(counts: Sequence[int], lost: Sequence[float]) -> Callable[[int], float]:
    at, values = list(counts)[::-1], list(lost)[::-1]
    return lambda count: float(np.interp(count, at, values))


def _unread(module: nn.Module, group: Group, gone: Tensor, told: Callable[[], float]) -> float:
    """How far the outputs are where nobody reads what is gone; the network is left as it was."""
    tensors = dict(module.named_parameters())
    before: dict[str, Tensor] = {}
    with torch.no_grad():
        for cut in group.cuts:
            if not cut.made:
                tensor = tensors[cut.parameter]
                before.setdefault(cut.parameter, tensor.detach().clone())
                tensor.index_fill_(cut.dim, cut.places[gone].reshape(-1).to(tensor.device), 0.0)
        try:
            return told()
        finally:
            for name, values in before.items():
                tensors[name].copy_(values)


def least_of(step: TakesUnits, groups: Sequence[Group]) -> dict[str, int]:
    """How many units every group keeps whatever is asked for."""
    return {group.name: max(1, ceil(step.keep_at_least * group.units - 1e-9)) for group in groups}
