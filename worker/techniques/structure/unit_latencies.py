"""How long a network without some of its units takes, by arithmetic from what its layers take at a few sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from worker.context import Context
from worker.structure.groups import Group
from worker.techniques.pruning.weights import is_transformers_conv1d
from worker.techniques.structure.costs import Costs, Counts
from worker.techniques.structure.latencies import layer_shares
from worker.techniques.structure.operators import CONVOLUTIONS, Clock, Shape, has_operator, shapes_given

LEVELS = (0.25, 0.5, 0.75, 1.0)  # shares of what a side of a weight has, at which its layer is timed


@dataclass(frozen=True)
class Table:
    """Seconds [rows, columns] that a layer takes with so many of both sides of its weight; none falls as they grow."""

    rows: Sequence[int]
    columns: Sequence[int]
    seconds: np.ndarray

    def at(self, rows: int, columns: int) -> float:
        """Between the sizes that were timed in proportion; below the least of them as that."""
        by_row = [float(np.interp(columns, self.columns, own)) for own in self.seconds]
        return float(np.interp(rows, self.rows, by_row))


class Latencies:
    """Seconds of a sample, by how many units each group keeps, of a network that takes so many as a `whole`.

    Linear layers and convolutions have a table each, of times as operators of ONNX Runtime. Other layers have their
    share of a pass in torch, in proportion to their weights, and what is nobody's is always there.
    """

    def __init__(self, context: Context, groups: Sequence[Group], whole: float) -> None:
        model, module = context.model, context.model.module
        shares = {name: whole * own for name, own in layer_shares(context).items()}
        self._others = Costs("parameters", model, groups)
        self._others.divide(model, shares)
        layers = {name: own for name, own in module.named_modules() if has_operator(own)}
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        clock = Clock(torch.get_num_threads())
        self._tables: list[tuple[str, Table]] = []  # by the weight, which layers may share
        for path, given in shapes_given(context, layers).items():
            weight = names[id(layers[path].get_parameter("weight"))]
            if given:
                self._others.forget(weight)
                self._tables.append((weight, _table(clock, layers[path], given, self._others.varied(weight))))
        told, others = self._of_tables({}), self._others({})
        # By itself a layer may take longer than in the network, where its inputs lie as it likes them.
        self._scale = min(1.0, max(0.0, whole - others) / told) if told else 1.0
        self._rest = max(0.0, whole - others - self._scale * told)

    def __call__(self, kept: Counts) -> float:
        return self._rest + self._others(kept) + self._scale * self._of_tables(kept)

    def _of_tables(self, kept: Counts) -> float:
        return sum(own.at(*self._others.sizes(name, kept)[:2]) for name, own in self._tables)


def _table(clock: Clock, layer: nn.Module, given: Sequence[Shape], varied: Mapping[int, bool]) -> Table:
    rows, columns = (_sizes(size, varied[dim]) for dim, size in enumerate(layer.get_parameter("weight").shape[:2]))
    taken = np.array([[_taken(clock, layer, given, (row, column)) for column in columns] for row in rows])
    # Noise makes times longer, never shorter: no more than with more units.
    for axis in (0, 1):
        taken = np.flip(np.minimum.accumulate(np.flip(taken, axis), axis), axis)
    return Table(rows, columns, taken)


def _sizes(size: int, varied: bool) -> list[int]:
    return sorted({max(1, round(level * size)) for level in LEVELS}) if varied else [size]


def _taken(clock: Clock, layer: nn.Module, given: Sequence[Shape], sizes: tuple[int, int]) -> float:
    made, axis, inputs = _resized(layer, *sizes)
    return sum(clock.seconds([made], (*shape[:axis], inputs, *shape[axis:][1:])) for shape in given)


def _resized(layer: Any, rows: int, columns: int) -> tuple[nn.Module, int, int]:
    """The layer with a weight of another size, and of its input the axis that differs, and its size."""
    bias = layer.bias is not None
    if not isinstance(layer, CONVOLUTIONS):
        outputs, inputs = (columns, rows) if is_transformers_conv1d(layer) else (rows, columns)
        return nn.Linear(inputs, outputs, bias, device="meta"), -1, inputs
    kind: Any = next(kind for kind in CONVOLUTIONS if isinstance(layer, kind))
    outputs, groups = rows, 1
    if layer.groups > 1:  # each input makes outputs of its own
        each = layer.out_channels // layer.in_channels
        groups = max(1, rows // each)
        outputs = groups * each
    inputs = columns * groups
    made = kind(
        inputs, outputs, layer.kernel_size, layer.stride, layer.padding, layer.dilation, groups, bias, device="meta"
    )
    return made, -len(layer.kernel_size) - 1, inputs
