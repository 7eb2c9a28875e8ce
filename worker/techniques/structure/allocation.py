"""Ranks for all layers together, within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from app.contract.errors import InvalidSpec
from worker.context import Context
from worker.model import Model
from worker.structure.forms import Factors
from worker.techniques.knapsack_math import frontier
from worker.techniques.pruning.sensitivity import measuring
from worker.techniques.structure.candidates import Candidate
from worker.techniques.structure.limits import Limit
from worker.techniques.structure.ranking import Option, Ranking

MEASURED = 4  # options of a layer whose effect on the outputs is measured; the others lie between them

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
        reachable = (rest + int(best.sizes[0])) / limit.whole
        raise InvalidSpec(
            f"With the lowest ranks in every layer that may become a product {reachable:.1%} of the {limit.measure} "
            f"are left, and the budget is {limit.share:.1%}. Give a larger one, or exclude fewer layers.",
        )
    return [
        None if choice == 0 else options[place][choice - 1].factors for place, choice in enumerate(best.choice(point))
    ]


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
            places = sorted({round(place) for place in np.linspace(0, len(own) - 1, min(MEASURED, len(own)))})
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
