"""Ranks for all layers together, within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from app.contract.errors import InvalidSpec
from worker.context import Context
from worker.model import Model
from worker.structure.edits import factorized
from worker.structure.forms import Factors
from worker.structure.restructured import restructure
from worker.techniques.knapsack_math import frontier
from worker.techniques.pruning.sensitivity import measuring
from worker.techniques.structure.candidates import Candidate
from worker.techniques.structure.factor_latencies import seconds
from worker.techniques.structure.limits import Limit
from worker.techniques.structure.meeting import Choice, met
from worker.techniques.structure.ranking import Option, Ranking, looked_at
from worker.techniques.structure.unit_limits import UnitLimit

TICK = 1e-9  # seconds

Losses = Sequence[Sequence[float]]
"""Of each layer's options."""


def costs(measure: str, one: Candidate, model: Model, factors: Factors | None) -> int:
    """Of a layer, as it is or as a product."""
    if measure == "macs":
        return one.macs if factors is None else one.macs_of(factors)
    weights = one.parameters if factors is None else factors.parameters(one.layer)
    if measure == "parameters":
        return weights
    return weights * model.dtypes.get(one.weight.name, one.weight.value().dtype).itemsize


def allotted(
    limit: Limit, model: Model, layers: Sequence[Candidate], options: Sequence[Sequence[Option]], losses: Losses
) -> list[Factors | None]:
    """For each layer the product that it becomes, or None for the layer as it is: those of least loss in the limit.

    Raises InvalidSpec, with what is reachable, where none is.
    """
    own = [costs(limit.measure, one, model, None) for one in layers]
    table = [
        [(own[place], 0.0)]
        + [
            (costs(limit.measure, one, model, option.factors), loss)
            for option, loss in zip(options[place], losses[place], strict=True)
        ]
        for place, one in enumerate(layers)
    ]
    rest = int(limit.whole) - sum(own)
    best = frontier(table)
    point = best.within(int(limit.most) - rest)
    if point is None:
        raise _beyond(limit, rest + int(best.sizes[0]))
    return _factors(options, best.choice(point))


def timed(
    limit: UnitLimit,
    context: Context,
    layers: Sequence[Candidate],
    options: Sequence[Sequence[Option]],
    losses: Losses,
) -> list[Factors | None]:
    """The same within a time: by what layers and products take on this machine, corrected by how long the whole network
    does with some. Raises as `allotted` does."""
    own = [[round(one / TICK) for one in told] for told in seconds(context, layers, options, limit.whole)]
    best = frontier([list(zip(told, [0.0, *lost], strict=True)) for told, lost in zip(own, losses, strict=True)])
    rest = round(limit.whole / TICK) - sum(told[0] for told in own)

    def find(most: float) -> Choice:
        return dict(enumerate(best.choice(best.within(int(most / TICK) - rest) or 0)))

    def estimated(choice: Choice) -> float:
        return TICK * (rest + sum(own[layer][place] for layer, place in choice.items()))

    def real(choice: Choice) -> float:
        pairs = zip(layers, _factors(options, list(choice.values())), strict=True)
        edits = [factorized(one.name, factors) for one, factors in pairs if factors is not None]
        module = restructure(context, edits)
        for edit in edits:
            _plain(module.get_submodule(edit["layer"]))
        return limit.real(context, module)

    found = met(limit, find, estimated, real)
    if found is None:
        raise _beyond(limit, real(find(0.0)))
    return _factors(options, list(found[1].values()))


def _plain(module: nn.Module) -> None:
    """Gives a module weights to be timed with: what new ones hold may be numbers that a processor is slow with."""
    for own in module.parameters():
        nn.init.constant_(own, 0.01)


def _factors(options: Sequence[Sequence[Option]], choice: Sequence[int]) -> list[Factors | None]:
    """Of each layer the option that it takes, the first being the layer as it is."""
    return [None if place == 0 else own[place - 1].factors for own, place in zip(options, choice, strict=True)]


def _beyond(limit: Limit, reachable: float) -> InvalidSpec:
    return InvalidSpec(
        f"With the lowest ranks in every layer that may become a product {reachable / limit.whole:.1%} of the "
        f"{limit.measure} are left, and the budget is {limit.share:.1%}. Give a larger one, or exclude fewer layers.",
    )


def by_energy(options: Sequence[Sequence[Option]]) -> Losses:
    """The share of a layer's energy that is left out."""
    return [[option.left_out for option in own] for own in options]


def by_outputs(
    context: Context, layers: Sequence[Candidate], rankings: Mapping[str, Ranking], options: Sequence[Sequence[Option]],
    samples: int,
) -> Losses:  # fmt: skip
    """How far the network's outputs diverge where one layer alone is what its product stands for: measured for a few
    options, and between them by the energy that is left out. Raises DatasetMismatch without data."""
    found = []
    weights = [one.weight for one in layers]
    with measuring(context, weights, samples, "Allocation measured looks at outputs for data") as curve:
        for one, own in zip(layers, options, strict=True):
            places = looked_at(own)
            values = (as_stored(one, rankings[one.name].product(own[place].factors)) for place in places)
            told = curve(one.weight, values)
            shares = [own[place].left_out for place in places][::-1]
            lost = np.maximum.accumulate([max(0.0, loss) for loss in told[::-1]])
            lies = np.interp([option.left_out for option in own], [0.0, *shares], [0.0, *lost]) if own else []
            found.append([float(loss) for loss in lies])
    return found


def as_stored(one: Candidate, weight: torch.Tensor) -> torch.Tensor:
    """In the layer's own form and place."""
    return one.weight.by_output(weight).to(one.weight.value())
