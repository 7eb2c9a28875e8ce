"""An architecture without one of the ways that meet in a Residual or in a Parallel that adds: as modules, and in words.

What a way is called: `layers` and `shortcut` of a Residual, the number of a branch of a Parallel.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from app.contract.architecture import Architecture
from app.contract.architecture import Parallel as ParallelSpec
from app.contract.architecture import Residual as ResidualSpec
from app.contract.architecture import Sequential as SequentialSpec
from app.contract.layers import Layer
from worker.loading.layers import Parallel, Residual

Way = str | int
WAYS = ("layers", "shortcut")


def other(way: Way) -> str:
    """Of a Residual the one that stays."""
    return WAYS[1 - WAYS.index(str(way))]


def without_way(module: nn.Module, path: str, way: Way) -> None:
    """In place. A Residual becomes what is left of it, or an Identity where that is nothing: so the names of all other
    weights stay. Raises AttributeError for a layer that there is not, or that is none of the two; IndexError or
    ValueError for a way."""
    layer = module.get_submodule(path)
    if isinstance(layer, Residual):
        left = getattr(layer, other(way))
        module.set_submodule(path, left if len(left) else nn.Identity())
    elif isinstance(layer, Parallel):
        branches = list(layer.branches)
        branches.pop(int(way))
        module.set_submodule(path, Parallel(branches, layer.join, layer.dim))  # type: ignore[arg-type]  # sequences
    else:
        raise AttributeError(f"no ways meet in {path}")


def told_without(layers: Sequence[Layer], path: str, way: Way) -> tuple[Layer, ...]:
    """The same of the words of an architecture."""
    place, _, rest = path.partition(".")
    changed = list(layers)
    changed[int(place)] = _inside(layers[int(place)], rest, way)
    return tuple(changed)


def was_called(name: str, path: str, way: Way) -> str:
    """What a weight of the architecture without the way was called before."""
    if not name.startswith(f"{path}."):
        return name
    rest = name.removeprefix(f"{path}.")
    if isinstance(way, str):
        return f"{path}.{other(way)}.{rest}"
    _, place, *inside = rest.split(".")
    return ".".join([path, "branches", str(int(place) + (int(place) >= way)), *inside])


def _inside(layer: Layer, path: str, way: Way) -> Layer:
    if not path:
        return _left(layer, way)
    if isinstance(layer, SequentialSpec):
        return layer.model_copy(update={"layers": told_without(layer.layers, path, way)})
    part, _, rest = path.partition(".")
    if isinstance(layer, ResidualSpec):
        return layer.model_copy(update={part: told_without(getattr(layer, part), rest, way)})
    assert isinstance(layer, ParallelSpec)
    place, _, rest = rest.partition(".")
    branches = list(layer.branches)
    branches[int(place)] = told_without(branches[int(place)], rest, way)
    return layer.model_copy(update={"branches": tuple(branches)})


def _left(layer: Layer, way: Way) -> Layer:
    if isinstance(layer, ParallelSpec):
        branches = list(layer.branches)
        branches.pop(int(way))
        return layer.model_copy(update={"branches": tuple(branches)})
    left = getattr(layer, other(way))
    if left:
        return SequentialSpec(type="Sequential", layers=left)
    nothing: Layer = Architecture.model_validate({"layers": [{"type": "Identity"}]}).layers[0]
    return nothing
