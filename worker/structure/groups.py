"""Channels, neurons, heads and hidden features that may leave a network, each with all that hangs on it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from worker.data.batch import Inputs
from worker.structure.literals import Literal, Reader
from worker.structure.tracing.classes import NONE
from worker.structure.tracing.rules import RULES
from worker.structure.tracing.tracer import Trace, Tracer, trace

Dims = dict[tuple[str, int], Tensor]


@dataclass(frozen=True, eq=False)
class Cut:
    """The entries of a parameter along one of its dimensions that go with each unit of a group.

    `places` is int64 [units, entries of each], `shape` the parameter's. `made`: what a product gives, and not what it
    reads.
    """

    parameter: str
    dim: int
    places: Tensor
    made: bool
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Units that may each leave the network, and for which the same parameters change. `name` is the first parameter
    that makes them."""

    name: str
    units: int
    cuts: tuple[Cut, ...]

    @property
    def kind(self) -> str:
        """The same for groups at the same place of equal blocks."""
        return " ".join(sorted({re.sub(r"\d+", "#", cut.parameter) + f":{cut.dim}:{cut.shape}" for cut in self.cuts}))

    @property
    def in_blocks(self) -> bool:
        """Whether a unit is made by entries in a row, as a head is."""
        first = next(cut.places for cut in self.cuts if cut.made)
        return first.shape[1] > 1 and int(first[0, 1] - first[0, 0]) == 1

    @property
    def pattern(self) -> tuple[int, str]:
        """The same for groups of one shape at the same place of equal blocks."""
        return self.units, self.kind


@dataclass(frozen=True)
class Structure:
    """What a network's parts hang together by: its groups, in the order of what makes them, and for each parameter and
    dimension the class that each entry is of. `kept_whole` says of parameters that make what has to stay why, and
    `literals` are numbers in a graph's code, with the classes of what they count."""

    groups: tuple[Group, ...]
    classes: Dims
    kept_whole: dict[str, str]
    literals: tuple[Literal, ...] = ()


def structure_of(module: nn.Module, inputs: Inputs) -> Structure:
    """By one pass. Raises what the network raises."""
    literals: list[Literal] = []

    def run(tracer: Tracer) -> Any:
        if not isinstance(module, fx.GraphModule):
            return module(*inputs)
        reader = Reader(module, tracer)
        outputs = reader.run(*inputs)
        literals.extend(reader.found)
        return outputs

    found = trace(module, run, RULES)
    counted = tuple(replace(own, labels=found.classes.roots(own.labels)) for own in literals)
    return Structure(_groups(found), _classes(found), _kept_whole(found), counted)


def _groups(found: Trace) -> tuple[Group, ...]:
    classes, made = found.classes, _made(found)
    of_class: dict[int, dict[tuple[str, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    for name, weight in found.weights.items():
        for dim, labels in enumerate(weight.dims):
            free = (~classes.frozen(labels)).nonzero().flatten()
            for place, root in zip(free.tolist(), classes.roots(labels)[free].tolist(), strict=True):
                of_class[root][name, dim].append(place)
    shapes = {name: weight.shape for name, weight in found.weights.items()}
    alike: dict[tuple[tuple[tuple[str, int], int], ...], list[dict[tuple[str, int], list[int]]]] = defaultdict(list)
    for own in of_class.values():
        if any(made[key] for key in own) and any(not made[key] for key in own):
            alike[tuple(sorted((key, len(places)) for key, places in own.items()))].append(own)
    order = {name: number for number, name in enumerate(found.weights)}
    groups = [_group(units, made, order, shapes) for units in alike.values() if len(units) > 1]
    groups.sort(key=lambda group: (order[group.name], int(group.cuts[0].places[0, 0])))
    names = [group.name for group in groups]
    # Parts of one parameter that are read by different ones.
    return tuple(
        group
        if names.count(group.name) == 1
        else replace(group, name=f"{group.name}/{names[:place].count(group.name)}")
        for place, group in enumerate(groups)
    )


def _group(
    units: Sequence[dict[tuple[str, int], list[int]]],
    made: dict[tuple[str, int], bool],
    order: dict[str, int],
    shapes: dict[str, tuple[int, ...]],
) -> Group:
    keys = sorted(units[0], key=lambda key: (order[key[0]], key[1]))
    first = next(key for key in keys if made[key])
    units = sorted(units, key=lambda own: own[first])
    cuts = tuple(Cut(*key, torch.tensor([own[key] for own in units]), made[key], shapes[key[0]]) for key in keys)
    return Group(first[0], len(units), cuts)


def _made(found: Trace) -> dict[tuple[str, int], bool]:
    """Of each parameter and dimension whether it is what is given by a product, or added to or scaled along that."""
    labels = set(torch.cat([torch.zeros(1, dtype=torch.int64), *found.made]).tolist()) - {NONE}
    # A vector has no other side that it could read with.
    return {
        (name, dim): len(weight.dims) == 1 or int(own[0] if len(own) else NONE) in labels
        for name, weight in found.weights.items()
        for dim, own in enumerate(weight.dims)
    }


def _classes(found: Trace) -> Dims:
    return {
        (name, dim): found.classes.roots(own)
        for name, weight in found.weights.items()
        for dim, own in enumerate(weight.dims)
    }


def _kept_whole(found: Trace) -> dict[str, str]:
    classes, told = found.classes, {}
    made = _made(found)
    for name, weight in found.weights.items():
        for dim, labels in enumerate(weight.dims):
            if len(weight.dims) > 1 and made[name, dim] and len(labels) and bool(classes.frozen(labels).all()):
                told[name] = classes.reason(int(labels[0]))
    return told
