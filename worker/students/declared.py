"""Narrower and shallower copies of a declarative architecture, with the weights that are left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from app.contract.architecture import Architecture, Parallel, Residual, Sequential
from app.contract.layers import Layer
from worker.data.batch import Inputs
from worker.students.depths import chosen
from worker.students.features import HANDLERS, Shapes, unknown
from worker.students.widths import Axis, Widths


@dataclass(frozen=True)
class Copy:
    """An architecture and its weights. `kept` says for each block that is left where it was, by its place now."""

    architecture: Architecture
    state: dict[str, Tensor]
    kept: Mapping[str, str]


def shallower(layers: Sequence[Layer], state: Mapping[str, Tensor], share: float) -> Copy:
    """Leaves out of each row of equal layers that hold weights all but a share, evenly, the first and the last stay.

    Equal neighbours take and give the same shapes, so what is left fits.
    """
    moved: dict[str, str] = {}
    kept: dict[str, str] = {}
    shorter = _shorter(layers, state, share, ("", ""), moved, kept)
    found = {new + name[len(old) :]: state[name] for new, old in moved.items() for name in state if _inside(name, old)}
    return Copy(Architecture(layers=tuple(shorter)), found, kept)


def _inside(name: str, layer: str) -> bool:
    return name.startswith(f"{layer}.")


def _shorter(
    layers: Sequence[Layer],
    state: Mapping[str, Tensor],
    share: float,
    at: tuple[str, str],
    moved: dict[str, str],
    kept: dict[str, str],
) -> list[Layer]:
    """`at` are the prefixes of the names now and before; `moved` collects every layer's name before by its name now."""
    shorter: list[Layer] = []
    for start, count in _rows(layers):
        weighted = any(_inside(name, f"{at[1]}{start}") for name in state)
        for index in (start + i for i in (chosen(count, share) if weighted else range(count))):
            names = f"{at[0]}{len(shorter)}", f"{at[1]}{index}"
            if weighted and count > 1:
                kept[names[0]] = names[1]
            shorter.append(_shorter_inside(layers[index], state, share, names, moved, kept))
    return shorter


def _shorter_inside(
    layer: Layer,
    state: Mapping[str, Tensor],
    share: float,
    names: tuple[str, str],
    moved: dict[str, str],
    kept: dict[str, str],
) -> Layer:
    def of(inner: Sequence[Layer], part: str) -> tuple[Layer, ...]:
        at = f"{names[0]}.{part}", f"{names[1]}.{part}"
        return tuple(_shorter(inner, state, share, at, moved, kept))

    if isinstance(layer, Sequential):
        return layer.model_copy(update={"layers": of(layer.layers, "")})
    if isinstance(layer, Residual):
        parts = {"layers": of(layer.layers, "layers."), "shortcut": of(layer.shortcut, "shortcut.")}
        return layer.model_copy(update=parts)
    if isinstance(layer, Parallel):
        branches = tuple(of(branch, f"branches.{i}.") for i, branch in enumerate(layer.branches))
        return layer.model_copy(update={"branches": branches})
    moved[names[0]] = names[1]
    return layer


def _rows(layers: Sequence[Layer]) -> list[tuple[int, int]]:
    """Where rows of equal layers begin, and how long they are."""
    rows: list[tuple[int, int]] = []
    for index, layer in enumerate(layers):
        if rows and layer == layers[index - 1]:
            rows[-1] = (rows[-1][0], rows[-1][1] + 1)
        else:
            rows.append((index, 1))
    return rows


def narrower(copy: Copy, module: nn.Module, example: Inputs, share: float) -> Copy:
    """Keeps a share of every group of features, those of the largest weights; inputs and outputs stay.

    `module` is the network of `copy`, in eval mode; `example` goes into it.
    """
    widths = Widths()
    walker = _Walker(widths, _shapes(module, example), dict(module.named_modules()))
    widths.keep_whole(walker.sequence(copy.architecture.layers, "", None))
    kept = widths.kept(copy.state, share)
    lengths = widths.lengths(kept)
    layers = tuple(_resized(layer, str(i), lengths) for i, layer in enumerate(copy.architecture.layers))
    return Copy(Architecture(layers=layers), widths.sliced(copy.state, kept), copy.kept)


class _Walker:
    """Follows the features of a network from layer to layer, through what nests."""

    def __init__(self, widths: Widths, shapes: Shapes, modules: Mapping[str, nn.Module]) -> None:
        self._widths, self._shapes, self._modules = widths, shapes, modules

    def sequence(self, layers: Sequence[Layer], prefix: str, axis: Axis) -> Axis:
        for index, layer in enumerate(layers):
            axis = self._layer(layer, f"{prefix}{index}", axis)
        return axis

    def _layer(self, layer: Layer, name: str, axis: Axis) -> Axis:
        if isinstance(layer, Sequential):
            return self.sequence(layer.layers, f"{name}.", axis)
        if isinstance(layer, Residual):
            body = self.sequence(layer.layers, f"{name}.layers.", axis)
            return self._widths.join((body, self.sequence(layer.shortcut, f"{name}.shortcut.", axis)))
        if isinstance(layer, Parallel):
            return self._parallel(layer, name, axis)
        handler = HANDLERS.get(layer.type, unknown)
        return handler(self._widths, name, self._modules[name], axis, self._shapes)

    def _parallel(self, layer: Parallel, name: str, axis: Axis) -> Axis:
        axes = [self.sequence(branch, f"{name}.branches.{i}.", axis) for i, branch in enumerate(layer.branches)]
        rank = len(self._shapes[name][1])
        if layer.join == "add" or None in axes:
            return self._widths.join(axes)
        runs = tuple(run for one in axes for run in one or ())
        place = layer.dim % rank
        if all(place == (rank - 1 if run.last else 1) for run in runs):
            return runs
        return self._widths.join(axes)  # along the positions: their features are the same ones


def _resized(layer: Layer, name: str, lengths: Mapping[tuple[str, str], int]) -> Layer:
    changes: dict[str, Any] = {}
    for argument in type(layer).model_fields:
        if (name, argument) in lengths:
            length = lengths[name, argument]
            changes[argument] = (length,) if argument == "normalized_shape" else length
    for part in ("layers", "shortcut"):
        if hasattr(layer, part):
            prefix = f"{name}." if isinstance(layer, Sequential) else f"{name}.{part}."
            changes[part] = tuple(_resized(one, f"{prefix}{i}", lengths) for i, one in enumerate(getattr(layer, part)))
    if isinstance(layer, Parallel):
        changes["branches"] = tuple(
            tuple(_resized(one, f"{name}.branches.{b}.{i}", lengths) for i, one in enumerate(branch))
            for b, branch in enumerate(layer.branches)
        )
    return layer.model_copy(update=changes)


def _shapes(module: nn.Module, example: Inputs) -> Shapes:
    found: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def noting(name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):  # attention inside an encoder layer gives two
                found[name] = (tuple(inputs[0].shape), tuple(output.shape))

        return hook

    hooks = [layer.register_forward_hook(noting(name)) for name, layer in module.named_modules() if name]
    try:
        with torch.no_grad():
            module(*example)
    finally:
        for hook in hooks:
            hook.remove()
    return found
