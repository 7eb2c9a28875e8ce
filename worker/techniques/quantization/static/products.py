"""The products of a float graph with constant weights, each as a matrix times columns of an input."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from onnx import GraphProto, NodeProto, TensorProto
from torch import Tensor
from torch.nn import functional

from worker.techniques.quantization.graph import attributes, uses

PLANE = 2  # dimensions of a picture
BIAS = 2  # the input of an operator that is its bias


@dataclass(frozen=True)
class Product:
    """A Gemm, MatMul or Conv of one group, whose constant `weight` nothing else reads.

    `given` is the tensor that it is multiplied with. `axis` is that of the weight's outputs. `bias` is a constant that
    is added to every output and to nothing else, if there is one.
    """

    node: NodeProto
    weight: str
    given: str
    axis: int
    bias: str | None

    @property
    def takes_bias(self) -> bool:
        """Whether one can be given to the operator, which has none."""
        return self.node.op_type == "Conv" and len(self.node.input) == BIAS

    def matrix(self, value: np.ndarray) -> Tensor:
        """[outputs, columns] of a tensor of the weight's shape."""
        rows = np.moveaxis(value, self.axis, 0)
        return torch.from_numpy(np.array(rows.reshape(len(rows), -1), np.float32))

    def unmatrix(self, rows: Tensor, shape: tuple[int, ...]) -> np.ndarray:
        """What `matrix` has laid out, in the weight's shape."""
        moved = [shape[self.axis], *(size for axis, size in enumerate(shape) if axis != self.axis)]
        return np.ascontiguousarray(np.moveaxis(rows.numpy().reshape(moved), 0, self.axis))

    def columns(self, given: np.ndarray, kernel: tuple[int, ...]) -> Tensor:
        """[products, columns] of an input; `kernel` is what the weight's shape says of places, () but for Conv."""
        values = torch.from_numpy(given)
        if not kernel:
            return values.reshape(-1, values.shape[-1])
        places = len(kernel)
        own = attributes(self.node)
        pads = own.get("pads", [0] * 2 * places)
        values = functional.pad(values, [pads[i] for axis in reversed(range(places)) for i in (axis, axis + places)])
        stride, dilation = own.get("strides", [1] * places), own.get("dilations", [1] * places)
        for _ in range(PLANE - places):  # one that is one high
            values, kernel = values.unsqueeze(2), (1, *kernel)
            stride, dilation = [1, *stride], [1, *dilation]
        unfolded = functional.unfold(values, kernel, dilation, 0, stride)  # [batch, columns, products]
        return unfolded.transpose(1, 2).flatten(0, 1)


def products(graph: GraphProto, tensors: Collection[str]) -> Iterator[Product]:
    """Every one of float32, in the order of the computation, whose input is one of `tensors`."""
    floats = [tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT]
    shapes = {tensor.name: tuple(tensor.dims) for tensor in floats}
    counts = uses(graph)
    readers = {name: node for node in graph.node for name in node.input}
    for node in graph.node:
        axis = _axis(node, shapes)
        if axis is None or node.input[0] not in tensors or counts[node.input[1]] != 1:
            continue
        outputs = shapes[node.input[1]][axis]
        bias = node.input[BIAS] if len(node.input) > BIAS else None
        if node.op_type == "MatMul" and counts[node.output[0]] == 1:
            bias = added(readers.get(node.output[0]), node.output[0])
        of_outputs = bias is not None and shapes.get(bias) == (outputs,) and counts[bias] == 1
        yield Product(node, node.input[1], node.input[0], axis, bias if of_outputs else None)


def _axis(node: NodeProto, shapes: dict[str, tuple[int, ...]]) -> int | None:
    """The axis of the weight's outputs; None where the node is no product with a constant weight."""
    if len(node.input) < 2 or node.input[1] not in shapes or node.input[0] in shapes:
        return None
    own, shape = attributes(node), shapes[node.input[1]]
    if node.op_type == "Conv" and own.get("group", 1) == 1 and len(shape) - 2 in (1, PLANE):
        return output_axis(node) if own.get("auto_pad", b"NOTSET") in (b"NOTSET", b"") else None
    if node.op_type == "Gemm" and not own.get("transA") and own.get("alpha", 1.0) == own.get("beta", 1.0) == 1.0:
        return output_axis(node)
    return output_axis(node) if node.op_type == "MatMul" and len(shape) == 2 else None


def output_axis(node: NodeProto) -> int:
    """The axis of a Conv's, Gemm's or MatMul's weight that its outputs lie along."""
    return 0 if node.op_type == "Conv" or attributes(node).get("transB") else 1


def added(node: NodeProto | None, tensor: str) -> str | None:
    """What a sum adds to a tensor; None where the only one that reads it is no sum, or the graph's end."""
    if node is None or node.op_type != "Add":
        return None
    return next((name for name in node.input if name != tensor), None)
