"""Layers that change nothing: in an architecture what only looks like one, elsewhere what no output is computed of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from worker.data.batch import Inputs
from worker.loading.layers import Residual
from worker.structure.fusing.watching import watched

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_ONCE = (nn.ReLU, nn.Flatten)  # which behind one of their own change nothing


def idle_layers(module: nn.Sequential, *, for_inference: bool) -> list[str]:
    """Names of layers that an architecture can do without. Its last one stays, and so does the only one of a Residual:
    there are no words for one without."""
    found = []
    last = _last(module)
    for path, stack in module.named_modules():
        if not isinstance(stack, nn.Sequential):
            continue
        own, before = [], None
        for place, layer in stack.named_children():
            name = f"{path}.{place}".lstrip(".")
            if name != last and _changes_nothing(layer, before, for_inference=for_inference):
                own.append(name)
            else:
                before = layer
        holder = module.get_submodule(path.rpartition(".")[0])
        only = isinstance(holder, Residual) and path.endswith(".layers") and len(own) == len(stack)
        found += own[1:] if only else own
    return found


def _last(module: nn.Sequential) -> str:
    """What is last says whether the network ends in logits."""
    name = ""
    layer: nn.Module = module
    while isinstance(layer, nn.Sequential) and len(layer):
        name = f"{name}.{len(layer) - 1}".lstrip(".")
        layer = layer[-1]
    return name


def _changes_nothing(layer: nn.Module, before: nn.Module | None, *, for_inference: bool) -> bool:
    if isinstance(layer, nn.Identity) or (for_inference and isinstance(layer, _DROPOUTS)):
        return True
    if isinstance(layer, nn.Flatten) and isinstance(before, nn.Flatten):
        return {(one.start_dim, one.end_dim) for one in (layer, before)} == {(1, -1)}
    return isinstance(layer, _ONCE[0]) and isinstance(before, _ONCE[0])


def kept_places(module: nn.Module, gone: Iterable[str]) -> dict[str, list[int]]:
    """What stays of each sequence that loses entries. A sequence in a sequence that would be empty leaves it."""
    left: dict[str, list[int]] = {}
    names = list(gone)
    while names:
        path, _, place = names.pop().rpartition(".")
        stack = module.get_submodule(path)
        own = left.setdefault(path, list(range(len(stack._modules))))
        own.remove(int(place))
        if not own and isinstance(module.get_submodule(path.rpartition(".")[0]), nn.Sequential) and path:
            del left[path]
            names.append(path)
    return left


def dead_layers(module: nn.Module, inputs: Sequence[Inputs]) -> list[str]:
    """Names of layers with weights none of which the output is computed of, whatever comes in."""
    needed: set[int] = set()
    for one in inputs:
        needed |= watched(module, one).needed()
    return [
        name
        for name, layer in module.named_modules()
        if name and next(layer.children(), None) is None and _is_dead(layer, needed)
    ]


def _is_dead(layer: nn.Module, needed: set[int]) -> bool:
    own = [one.untyped_storage().data_ptr() for one in layer.parameters()]
    return bool(own) and not needed.intersection(own)
