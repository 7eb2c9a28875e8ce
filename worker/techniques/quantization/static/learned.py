"""What quantization-aware training has settled of a graph: steps of weights, and ranges of what they multiply."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import GraphProto, NodeProto

from worker.techniques.quantization.graph import constants
from worker.techniques.quantization.static.products import output_axis
from worker.techniques.quantization.static.ranges_math import Range
from worker.techniques.quantization.static.rounding import Rounded
from worker.techniques.quantization.stored import base_name, weight_inputs

# What comes out has the grid of what goes in: the quantizer takes the range from there.
PASSING = frozenset({"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"})
TOLERANCE = 1e-3  # of a step, that a weight may lie off its grid: a norm that is folded in rounds in float32


@dataclass(frozen=True)
class LearnedWeight:
    """The rows [outputs, columns] of a weight, and the steps [outputs] that they are multiples of."""

    rows: np.ndarray
    steps: np.ndarray

    def steps_of(self, rows: np.ndarray) -> np.ndarray | None:
        """Those of the rows that a graph has, each a multiple of the weight's own; None where they are not.

        A norm that was folded into a layer has multiplied each output by a factor, below zero perhaps.
        """
        if rows.shape != self.rows.shape:
            return None
        power = np.square(self.rows).sum(1)
        factors = np.where(power > 0, (rows * self.rows).sum(1) / np.where(power > 0, power, 1.0), 1.0)
        steps = np.abs(factors) * self.steps
        steps = np.where(steps > 0, steps, 1.0)
        off = np.abs(rows - factors[:, None] * self.rows)
        return steps.astype(np.float32) if (off <= TOLERANCE * steps[:, None]).all() else None


@dataclass(frozen=True)
class Learned:
    """Weights on grids, a step an output, and ranges of what comes into their layers, by the weights' names."""

    weights: Mapping[str, LearnedWeight] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)

    def ranges_in(self, graph: GraphProto) -> dict[str, Range]:
        """By the names of the graph's tensors: what products read, and what it was before it was pooled or reshaped.

        All that was made of one tensor so has one range, which holds those of all who read any of it.
        """
        makers = {name: node for node in graph.node for name in node.output}
        spans: dict[str, Range] = {}
        sources: dict[str, str] = {}
        for node, weight in _products(graph):
            own = self.ranges.get(base_name(weight))
            if own is None:
                continue
            names = list(_unpassed(makers, node.input[0]))
            sources |= dict.fromkeys(names, names[-1])
            spans[names[-1]] = own.joined(spans.get(names[-1], own))
        return {name: spans[source] for name, source in sources.items()}

    def steps_in(self, graph: GraphProto, chosen: Iterable[str]) -> dict[str, Rounded]:
        """The steps of those weights of the nodes that are chosen which still lie on grids."""
        nodes = set(chosen)
        own = [pair for pair in _products(graph) if pair[0].name in nodes and base_name(pair[1]) in self.weights]
        values = constants(graph, (weight for _, weight in own))
        found = {}
        for node, weight in own:
            axis = output_axis(node)
            rows = np.moveaxis(values[weight], axis, 0)
            steps = self.weights[base_name(weight)].steps_of(rows.reshape(len(rows), -1))
            if steps is not None:
                found[weight] = Rounded(steps, axis)
        return found


NOTHING_LEARNED = Learned()


def _unpassed(makers: Mapping[str, NodeProto], name: str) -> Iterator[str]:
    """A tensor, and what it was made of by nothing but PASSING, back to where that begins."""
    yield name
    while (maker := makers.get(name)) is not None and maker.op_type in PASSING:
        name = maker.input[0]
        yield name


def _products(graph: GraphProto) -> Iterator[tuple[NodeProto, str]]:
    return ((node, weight) for node, weight in weight_inputs(graph) if node.op_type != "Gather")
