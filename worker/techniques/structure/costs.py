"""What a network without some of its units costs, by arithmetic; and what it really costs, counted on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from worker.evaluation.macs import layer_macs
from worker.model import Model
from worker.structure.calls import example_on
from worker.structure.groups import Group

Counts = Mapping[str, int]
"""By a group's name how many units it keeps."""


class Costs:
    """Of one measure of a budget: parameters, macs or bytes."""

    def __init__(self, measure: str, model: Model, groups: Sequence[Group]) -> None:
        self.measure = measure
        self._shapes = {name: tuple(own.shape) for name, own in model.module.named_parameters()}
        self._each = {name: _each(measure, model, name) for name in self._shapes}
        self._fixed = 0.0
        if measure == "macs":
            counted = layer_macs(model.module, example_on(model.module, model, 1))
            self._fixed = self._divided(model, counted, counted.get("", 0))
        self._cuts: dict[str, list[tuple[int, Group, int]]] = {}
        for group in groups:
            for cut in group.cuts:
                if cut.parameter in self._shapes:
                    own = self._cuts.setdefault(cut.parameter, [])
                    own.append((cut.dim, group, cut.places.shape[1]))

    def __call__(self, kept: Counts) -> float:
        """For these numbers of units, those of other groups being all there."""
        return self._fixed + sum(each * prod(self._shape(name, kept)) for name, each in self._each.items() if each)

    def _shape(self, name: str, kept: Counts) -> list[int]:
        sizes = list(self._shapes[name])
        for dim, group, places in self._cuts.get(name, ()):
            sizes[dim] -= (group.units - kept.get(group.name, group.units)) * places
        return sizes

    def take(self, model: Model, shares: Mapping[str, float], whole: float) -> None:
        """Measures otherwise: by what of a whole each layer has, by its name, in proportion to its weights."""
        self._fixed = self._divided(model, {name: whole * own for name, own in shares.items()}, whole)

    def _divided(self, model: Model, counted: Mapping[str, float], left: float) -> float:
        """Gives each weight's entries what its layer has, without the layers in it; returns the rest, such as products
        of activations."""
        own = dict.fromkeys(self._each, 0.0)
        names = {id(parameter): name for name, parameter in model.module.named_parameters()}
        for path, layer in model.module.named_modules():
            # A weight that layers share has one name, and costs what it does in each of them.
            weights = [names[id(one)] for one in layer.parameters(recurse=False) if one.ndim > 1]
            whole = sum(prod(self._shapes[name]) for name in weights)
            inside = sum(counted.get(f"{path}.{child}".lstrip("."), 0) for child, _ in layer.named_children())
            has = counted.get(path, 0) - inside
            if whole and has > 0 and path:
                for name in weights:
                    own[name] += has / whole
                left -= has
        self._each = own
        return left


def _each(measure: str, model: Model, name: str) -> float:
    if measure != "bytes":
        return 1.0
    parameter = model.module.get_parameter(name)
    return float(model.dtypes.get(name, parameter.dtype).itemsize)
