"""Multiply-accumulates of an ONNX graph, float or int8, from the shapes that its tensors really have in one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, ValueInfoProto

Shape = tuple[int, ...]
Counter = Callable[[NodeProto, Sequence[Shape], Shape], int]


def _convolution(node: NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    """Each output value takes in-channels/groups x kernel products; weight [out, in/groups, *kernel]."""
    return math.prod(output) * math.prod(inputs[1][1:])


def _transposed_convolution(node: NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    """Each input value takes out-channels/groups x kernel products; weight [in, out/groups, *kernel]."""
    return math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _product(node: NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    """[..., m, k] x [..., k, n] takes k products an output value."""
    return math.prod(output) * inputs[0][-1]


def _gemm(node: NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(output) * inputs[0][0 if transposed else 1]


def _recurrent(node: NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    """Each step multiplies input and state with all gates; X [steps, batch, in], W [dirs, gates, in], R likewise."""
    steps, batch = inputs[0][:2]
    return steps * batch * (math.prod(inputs[1]) + math.prod(inputs[2]))


COUNTERS: dict[str, Counter] = {
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "ConvTranspose": _transposed_convolution,
    "MatMul": _product,
    "MatMulInteger": _product,
    "Gemm": _gemm,
    "LSTM": _recurrent,
    "GRU": _recurrent,
}


def graph_macs(proto: ModelProto, feed: Mapping[str, np.ndarray]) -> int:
    """MACs of one run on `feed` (batch 1 for MACs of one sample): convolutions, products and recurrent layers."""
    nodes = [node for node in proto.graph.node if node.op_type in COUNTERS]
    shapes = _shapes(proto, nodes, feed)
    return sum(
        COUNTERS[node.op_type](node, [shapes.get(name, ()) for name in node.input], shapes.get(node.output[0], ()))
        for node in nodes
    )


def _shapes(proto: ModelProto, nodes: Sequence[NodeProto], feed: Mapping[str, np.ndarray]) -> dict[str, Shape]:
    """The shapes of what these nodes take and give, read off a run that hands all of it out."""
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    shapes |= {name: array.shape for name, array in feed.items()}
    # A recurrent layer may leave out its first output, and nothing is counted by it.
    wanted = {name for node in nodes for name in (*node.input, *node.output[:1]) if name and name not in shapes}
    probe = onnx.ModelProto()
    probe.CopyFrom(proto)
    given = {value.name for value in probe.graph.output}
    probe.graph.output.extend(ValueInfoProto(name=name) for name in sorted(wanted - given))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # a fused tensor is not handed out
    options.log_severity_level = 3
    session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in probe.graph.output]
    shapes |= {name: array.shape for name, array in zip(names, session.run(names, dict(feed)), strict=True)}
    return shapes
