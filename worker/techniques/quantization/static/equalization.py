"""Cross-layer equalization in a graph: factors for the channels between two layers, where what lies between lets them
through. The graph gives what it gave and takes as long, and its weights differ less from channel to channel."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from worker.techniques.quantization.graph import attributes, constants, replace_constant, sole_readers
from worker.techniques.quantization.static.equalization_math import equalized
from worker.techniques.quantization.static.products import BIAS, added

MATRIX = 2  # dimensions
CONVOLUTIONS = ("Conv", "ConvTranspose")
# What gives s f(x) for s x, with a positive s for each channel, in whichever dimension channels lie.
HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "Identity")
# And what does where they lie in the second.
POOLING = ("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool")

Row = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """A node with a constant `weight` of its own, of `shape`; `groups` are those of a convolution, `made` is what the
    node gives, with its bias. `inputs_first` says that the weight's first dimension is that of inputs.

    `vectors` are the constants to be scaled with its outputs besides the weight; None where they cannot be.
    """

    node: NodeProto
    weight: str
    shape: tuple[int, ...]
    groups: int
    inputs_first: bool
    vectors: tuple[str, ...] | None
    made: str

    @property
    def is_convolution(self) -> bool:
        """Whether channels are the second dimension of what it reads and gives, and not the last."""
        return self.node.op_type in CONVOLUTIONS

    @property
    def outputs(self) -> int:
        return self.groups * self.shape[1] if self.inputs_first else self.shape[0]

    @property
    def inputs(self) -> int:
        return self.shape[0] if self.inputs_first else self.groups * self.shape[1]

    def magnitudes(self, value: np.ndarray) -> np.ndarray:
        """[groups, outputs, inputs]: the largest |w| over the places of a kernel."""
        largest = np.abs(value).reshape(*self.shape[:2], -1).max(2)
        parts = largest.reshape(self.groups, -1, self.shape[1])
        return parts.swapaxes(1, 2) if self.inputs_first else parts

    def of_outputs(self, scale: np.ndarray) -> np.ndarray:
        """Numbers [outputs], as they broadcast against the weight."""
        return self._across(scale) if self.inputs_first else self._along(scale)

    def of_inputs(self, scale: np.ndarray) -> np.ndarray:
        """Numbers [inputs], as they broadcast against the weight."""
        return self._along(scale) if self.inputs_first else self._across(scale)

    def _along(self, scale: np.ndarray) -> np.ndarray:
        return scale.reshape(-1, *[1] * (len(self.shape) - 1))

    def _across(self, scale: np.ndarray) -> np.ndarray:
        """In the second dimension, which counts within a group; the first one's places lie group after group."""
        rows = np.repeat(scale.reshape(self.groups, -1), self.shape[0] // self.groups, 0)
        return rows.reshape(*self.shape[:2], *[1] * (len(self.shape) - 2))


def equalize(proto: ModelProto, chosen: Collection[str]) -> list[Row]:
    """Changes weights and biases in place. `chosen` are the names of nodes that will be rounded: both of a pair are.

    Returns the pairs (names of weights) with the least and the largest of their factors; those in which nothing is to
    be gained are left alone, and not among them.
    """
    layers = list(_layers(proto.graph, chosen))
    pairs = list(_pairs(proto.graph, layers))
    values = constants(proto.graph, {layers[place].weight for pair in pairs for place in pair})
    places = sorted({place for pair in pairs for place in pair})
    magnitudes = [layers[place].magnitudes(values[layers[place].weight]) for place in places]
    found = equalized(magnitudes, [(places.index(first), places.index(second)) for first, second in pairs])
    rows: list[Row] = []
    for (made, read), scale in zip(pairs, found, strict=True):
        if np.all(scale == 1.0):
            continue
        first, second = layers[made], layers[read]
        values[first.weight] = values[first.weight] / first.of_outputs(scale)
        values[second.weight] = values[second.weight] * second.of_inputs(scale)
        for name, vector in constants(proto.graph, first.vectors or ()).items():
            replace_constant(proto.graph, name, vector / scale)
        least, most = float(scale.min()), float(scale.max())
        rows.append({"first": first.weight, "second": second.weight, "least_factor": least, "largest_factor": most})
    for name, value in values.items():
        replace_constant(proto.graph, name, value)
    return rows


def _pairs(graph: GraphProto, layers: list[Layer]) -> Iterator[tuple[int, int]]:
    """The places of a layer and of the one that alone reads what it gives, through nothing but what factors pass."""
    alone = sole_readers(graph)
    places = {layer.node.output[0]: place for place, layer in enumerate(layers)}
    for place, layer in enumerate(layers):
        passing = (*HOMOGENEOUS, *POOLING) if layer.is_convolution else HOMOGENEOUS
        tensor, reader = layer.made, alone.get(layer.made)
        while reader is not None and reader.input[0] == tensor and reader.op_type in passing:
            tensor, reader = reader.output[0], alone.get(reader.output[0])
        if layer.vectors is None or reader is None or reader.input[0] != tensor:
            continue
        other = places.get(reader.output[0])
        if other is not None and _fit(layer, layers[other]):
            yield place, other


def _fit(first: Layer, second: Layer) -> bool:
    return first.is_convolution == second.is_convolution and first.outputs == second.inputs


def _layers(graph: GraphProto, chosen: Collection[str]) -> Iterator[Layer]:
    """Every one of the chosen nodes whose weight is a float32 constant that nothing else reads."""
    shapes = {one.name: tuple(one.dims) for one in graph.initializer if one.data_type == TensorProto.FLOAT}
    alone = sole_readers(graph)
    for node in graph.node:
        weight = node.input[1] if len(node.input) > 1 else ""
        shape = shapes.get(weight, ())
        if node.name not in chosen or weight not in alone or not _weighs(node, shape):
            continue
        own, (bias, made) = attributes(node), _biased(node, alone)
        first = node.op_type in ("ConvTranspose", "MatMul") or (node.op_type == "Gemm" and not own.get("transB"))
        layer = Layer(node, weight, shape, own.get("group", 1), first, (bias,) if bias else (), made)
        if bias and not (bias in alone and shapes.get(bias) == (layer.outputs,)):
            layer = replace(layer, vectors=None)
        yield layer


def _weighs(node: NodeProto, shape: tuple[int, ...]) -> bool:
    """Whether it multiplies what it reads first with a weight of such a shape, channel by channel."""
    if node.op_type in CONVOLUTIONS:
        return len(shape) > MATRIX
    return len(shape) == MATRIX and (
        node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes(node).get("transA"))
    )


def _biased(node: NodeProto, alone: Mapping[str, NodeProto]) -> tuple[str, str]:
    """What is added to the outputs, "" if nothing is, and the tensor that comes of it."""
    reader = alone.get(node.output[0])
    sum_ = added(reader, node.output[0]) if node.op_type == "MatMul" else None
    if reader is not None and sum_ is not None:
        return sum_, reader.output[0]
    return node.input[BIAS] if len(node.input) > BIAS else "", node.output[0]
