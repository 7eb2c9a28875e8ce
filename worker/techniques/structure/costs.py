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
            self._fixed = counted.get("", 0) - self.divide(model, counted)
        self._cuts: dict[str, list[tuple[int, Group, int]]] = {}
        for group in groups:
            for cut in group.cuts:
                if cut.parameter in self._shapes:
                    own = self._cuts.setdefault(cut.parameter, [])
                    own.append((cut.dim, group, cut.places.shape[1]))

    def __call__(self, kept: Counts) -> float:
        """For these numbers of units, those of other groups being all there."""
        return self._fixed + sum(each * prod(self.sizes(name, kept)) for name, each in self._each.items() if each)

    def sizes(self, name: str, kept: Counts) -> list[int]:
        """The shape of a parameter."""
        sizes = list(self._shapes[name])
        for dim, group, places in self._cuts.get(name, ()):
            sizes[dim] -= (group.units - kept.get(group.name, group.units)) * places
        return sizes

    def varied(self, name: str) -> dict[int, bool]:
        """By each dimension of a parameter, whether it falls with the units of some group."""
        cut = {dim for dim, _, _ in self._cuts.get(name, ())}
        return {dim: dim in cut for dim in range(len(self._shapes[name]))}

    def divide(self, model: Model, counted: Mapping[str, float]) -> float:
        """Gives each weight's entries, and no others, what its layer has by its name, without the layers in it; returns
        how much that is in all. The rest is nobody's, such as products of activations."""
        own, divided = dict.fromkeys(self._each, 0.0), 0.0
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
                divided += has
        self._each = own
        return divided

    def forget(self, name: str) -> None:
        """Lets a parameter cost nothing."""
        self._each[name] = 0.0


def _each(measure: str, model: Model, name: str) -> float:
    if measure != "bytes":
        return 1.0
    parameter = model.module.get_parameter(name)
    return float(model.dtypes.get(name, parameter.dtype).itemsize)
