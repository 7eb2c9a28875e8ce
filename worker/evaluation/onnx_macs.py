"""Multiply-accumulates of an ONNX graph, float or int8, from the shapes that its tensors really have in one run."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, ValueInfoProto

from worker.loading.onnx_constants import scopes

_RAN = "_kernel_time"  # what the runtime's record adds to a node's name
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


def _attention(node: NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    """Every query meets every key and every weight a value; [batch, heads, steps, width] or [batch, steps, all]."""
    query, key, value = inputs[:3]
    steps, width = key[-2], query[-1] + value[-1]
    if len(query) == 3:  # heads side by side; fewer of keys and values serve several of queries
        heads = {attribute.name: attribute.i for attribute in node.attribute}
        width = query[-1] + value[-1] * heads["q_num_heads"] // heads["kv_num_heads"]
    return math.prod(query[:-1]) * steps * width


COUNTERS: dict[str, Counter] = {
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "ConvTranspose": _transposed_convolution,
    "MatMul": _product,
    "MatMulInteger": _product,
    "MatMulNBits": _product,
    "Gemm": _gemm,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "Attention": _attention,
}


def graph_macs(proto: ModelProto, feed: Mapping[str, np.ndarray]) -> int:
    """MACs of one run on `feed` (batch 1 for MACs of one sample): convolutions, products and recurrent layers."""
    nodes = [node for node in proto.graph.node if node.op_type in COUNTERS]
    shapes = _shapes(proto, nodes, feed)
    total = sum(
        COUNTERS[node.op_type](node, [shapes.get(name, ()) for name in node.input], shapes.get(node.output[0], ()))
        for node in nodes
    )
    branches = any(
        attribute.type == onnx.AttributeProto.GRAPH for node in proto.graph.node for attribute in node.attribute
    )
    return total + (_branch_macs(proto, feed) if branches else 0)


def _branch_macs(proto: ModelProto, feed: Mapping[str, np.ndarray]) -> int:
    """MACs of what ran in the graphs within the graph, read off the runtime's own record of one run.

    Values inside a branch cannot be handed out; the record has the shapes that every node took and gave.
    """
    named = onnx.ModelProto()
    named.CopyFrom(proto)
    inside: dict[str, tuple[NodeProto, dict[str, Shape]]] = {}
    for number, graph, known in scopes(named):
        sizes = {name: tuple(tensor.dims) for name, (_, tensor) in known.items()}
        for index, node in enumerate(graph.node if number else ()):
            node.name = f"branch_{number}_{index}"
            if node.op_type in COUNTERS:
                inside[node.name] = node, sizes
    total = 0
    for name, given, output in _record(named, feed):
        if name in inside:
            node, sizes = inside[name]
            rest = iter(given)  # constants are not in the record
            inputs = [sizes[value] if value in sizes else next(rest, ()) for value in node.input if value]
            total += COUNTERS[node.op_type](node, inputs, output)
    return total


def _record(proto: ModelProto, feed: Mapping[str, np.ndarray]) -> Iterator[tuple[str, list[Shape], Shape]]:
    """Every node that ran, as often as it did: its name, the shapes that it took, and that of its first output."""
    with tempfile.TemporaryDirectory() as folder:
        options = _options()
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/record"
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text())
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_RAN):
            given, made = (
                [tuple(shape) for one in event["args"][f"{side}_type_shape"] for shape in one.values()]
                for side in ("input", "output")
            )
            yield event["name"].removesuffix(_RAN), given, made[0] if made else ()


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # a fused tensor is not handed out
    options.log_severity_level = 3
    return options


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
    session = ort.InferenceSession(probe.SerializeToString(), _options(), providers=["CPUExecutionProvider"])
    names = [value.name for value in probe.graph.output]
    shapes |= {name: array.shape for name, array in zip(names, session.run(names, dict(feed)), strict=True)}
    return shapes
