"""Width multipliers: every group of units keeps a share of them, the best, with training to recover."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf, isnan

import torch
from torch import Tensor, nn

from app.contract.errors import InvalidSpec
from app.contract.widths import ResizeWidth
from worker.context import Context
from worker.structure.expressed import counted_by_hidden_size
from worker.structure.groups import Group, Structure
from worker.structure.narrowing import left
from worker.structure.restructured import retake, take
from worker.structure.sound import without
from worker.techniques.base import Details
from worker.techniques.pruning.sensitivity import drift
from worker.techniques.structure import width_math
from worker.techniques.structure.importance import scores
from worker.techniques.structure.limits import had, remaining
from worker.techniques.structure.renewal import Renewal, fitted_layers
from worker.techniques.structure.selection import least_of
from worker.techniques.structure.statistics import Found
from worker.techniques.structure.structured import free_groups, structure_in
from worker.techniques.structure.unit_limits import LATENCY, UnitLimit, within_budget
from worker.techniques.structure.units_math import Pool
from worker.training.finding.settle import settle
from worker.training.loop import train

CHOSEN = "width"  # in what a checkpoint remembers
SEARCH = 0.5  # the part of the progress of a search, where a training follows
WHY = "Search evolutionary looks at outputs for data"
Row = dict[str, float | int | str | None]


@dataclass(frozen=True)
class Choice:
    """Which units of each group stay, by which multiplier, what layers become without the others, and what the report
    says of the way there."""

    kept: dict[str, Tensor]
    shares: Mapping[str, float]
    found: Found
    details: Details = field(default_factory=dict)


def resize_width(step: ResizeWidth, context: Context) -> Details:
    """Chooses, makes the network narrower, and trains where the step says so. An earlier attempt that was cut off in
    the training has chosen already."""
    before = had(context.model)
    told = ((context.checkpoints and context.checkpoints.remembered()) or {}).get(CHOSEN)
    if told:
        retake(context, [told["edit"]])  # its weights and statistics come with the checkpoint
    else:
        told = _narrow(step, context)
    details: Details = told["details"] | remaining(before, context.model)
    if step.training is None:
        return details
    training, found = settle(context, step.training)
    found.pop(CHOSEN, None)
    if context.checkpoints is not None:
        context.checkpoints.remember({**found, CHOSEN: told})
    progress = functools.partial(_training_progress, context, SEARCH if step.search == "evolutionary" else 0.0)
    return details | found | train(replace(context, progress=progress), training).details()


def _training_progress(context: Context, begun: float, share: float) -> None:
    context.progress(begun + (1 - begun) * share)


def _narrow(step: ResizeWidth, context: Context) -> dict[str, Details]:
    """The same in all processes. The edit, and what the report says."""
    structure = structure_in(context.model)
    groups, alone = free_groups(step, context.model, structure)
    choice = context.ranks.told(lambda: _Widths(step, context, structure, groups).chosen())
    own = [group for group in groups if group.name in choice.kept]
    module, edit = without(context.model.module, structure, own, choice.kept)
    module.load_state_dict(choice.found, strict=False)
    take(context, module, [edit])
    rows: list[Row] = [
        {
            "name": group.name,
            "units": group.units,
            "kept": len(choice.kept[group.name]) if group in own else group.units,
            "multiplier": choice.shares.get(group.name),
        }
        for group in groups
    ]
    details: Details = {"method": step.method, "criterion": step.criterion, "search": step.search, "groups": rows}
    if alone:
        details["left_alone"] = [{"name": name, "why": why} for name, why in alone.items()]
    details["batch_norms_estimated"] = sum(name.endswith("running_mean") for name in choice.found)
    return {"edit": edit, "details": details | choice.details}


class _Widths:
    """What one choice is made of.

    Candidates are judged by how far their outputs on samples are from the whole network's, by the task's divergence,
    and not by the task's metric: that needs no labels, and tells candidates apart of which on some hundred samples as
    many answers are right. Each is made and not imitated by weights that are zero, since norms look at all units.
    """

    def __init__(self, step: ResizeWidth, context: Context, structure: Structure, groups: list[Group]) -> None:
        self._step, self._context, self._structure = step, context, structure
        own = scores(step, context, groups)
        self._groups = [group for group in groups if group.name in own]
        self._pools = _pools(step, context, self._groups, own)
        self._renewal = Renewal(step, context)

    def chosen(self) -> Choice:
        """Raises InvalidSpec for a budget that cannot be kept, with what can, and where nothing is narrower."""
        step = self._step
        if step.budget is None:
            assert step.multiplier is not None
            return self._uniform(step.multiplier)
        limit = within_budget(step.budget, self._context)
        share = self._widest(limit)
        return self._uniform(share) if step.search == "uniform" else self._searched(limit, share)

    def _uniform(self, share: float) -> Choice:
        counts = width_math.kept(self._pools, share)
        return self._choice(counts, dict.fromkeys(counts, share), {"multiplier": share})

    def _choice(self, counts: width_math.Counts, shares: Mapping[str, float], details: Details) -> Choice:
        if all(counts[group.name] == group.units for group in self._groups):
            raise InvalidSpec(
                "No group of units becomes smaller: a share of what it has, rounded to round_to, is all of it. Give a "
                "smaller multiplier, budget or round_to."
            )
        found = self._renewed(counts)[1]
        return Choice(self._stay(counts), shares, found, details | {"reconstructed_layers": fitted_layers(found)})

    def _widest(self, limit: UnitLimit) -> float:
        """One multiplier for all groups."""

        def near(has: float) -> bool:
            """A time is never the same twice, and a count is exact."""
            return limit.measure == LATENCY and limit.is_met(has)

        def real(counts: Mapping[str, int]) -> float:
            return limit.real(self._context, self._made(counts))

        least = self._step.keep_at_least
        found = width_math.widest(self._pools, real, limit.most, least, near)
        if found is None:
            has = real(width_math.kept(self._pools, least))
            raise InvalidSpec(
                f"With the smallest multiplier that keep_at_least allows {has / limit.whole:.1%} of the "
                f"{limit.measure} are left, and {limit.share:.1%} are asked for. Give a larger budget, a smaller "
                "keep_at_least, or exclude fewer layers."
            )
        return found

    def _searched(self, limit: UnitLimit, uniform: float) -> Choice:
        """One for each kind of layer. What a candidate costs is found by arithmetic, in proportion to what the uniform
        one really costs; of one that would be the best it is counted, or measured."""
        context, step = self._context, self._step
        far = drift(context, step.samples, WHY)
        kinds = width_math.kinds(self._pools, uniform, step.keep_at_least)
        start = width_math.start_of(kinds, uniform)
        cost, alike = limit.cost(context, self._groups), width_math.kept(self._pools, uniform)
        most = limit.most * cost(alike) / limit.real(context, self._made(alike))
        search = width_math.Evolution(kinds, cost, most, context.seed)
        expected = min(step.candidates, search.size)
        part = 1.0 if step.training is None else SEARCH

        def score(counts: width_math.Counts) -> float:
            made, _ = self._renewed(counts)
            own = far(made.eval())
            own = inf if isnan(own) else own
            if search.scores and own < min(search.scores.values()) and limit.real(context, made) > limit.most:
                own = inf
            context.progress(part * min(1.0, (len(search.scores) + 1) / expected))
            return own

        best = search.run(start, score, step.candidates)
        context.progress(part)
        shares = search.shares(best)
        told: list[Row] = [
            {"kind": kind.pools[0].name, "groups": len(kind.pools), "multiplier": share}
            for kind, share in zip(kinds, shares, strict=True)
        ]
        details: Details = {
            "uniform_multiplier": uniform,
            "multipliers": told,
            "candidates_tried": len(search.scores),
            "divergence": _finite(search.scores[best]),
            "uniform_divergence": _finite(search.scores[start]),
        }
        return self._choice(search.counts(best), width_math.by_group(kinds, shares), details)

    def _made(self, counts: Mapping[str, int]) -> nn.Module:
        return without(self._context.model.module, self._structure, self._groups, self._stay(counts))[0]

    def _renewed(self, counts: Mapping[str, int]) -> tuple[nn.Module, Found]:
        """As it would be delivered, and what in it is not the whole network's."""
        made = self._made(counts)
        return made, self._renewal.of(made, left(self._structure, self._groups, self._stay(counts)))

    def _stay(self, counts: Mapping[str, int]) -> dict[str, Tensor]:
        return {pool.name: pool.best(counts[pool.name]) for pool in self._pools}


def _finite(score: float) -> float | None:
    return score if score < inf else None


def _pools(step: ResizeWidth, context: Context, groups: list[Group], own: Mapping[str, Tensor]) -> list[Pool]:
    """Groups of one shape at the same place of equal blocks are tied, and so are those that a config counts by one
    number: these keep whole heads."""
    least = least_of(step, groups)
    bound, size = counted_by_hidden_size(context.model, groups)
    return [
        Pool(
            group.name,
            own[group.name].to(torch.float64),
            least[group.name],
            1 if group.in_blocks else size if group in bound else min(step.round_to, group.units),
            "hidden" if group in bound else group.pattern,
        )
        for group in groups
    ]
