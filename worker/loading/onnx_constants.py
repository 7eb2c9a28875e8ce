"""The tensors inside an ONNX graph: where its weights are, also in graphs within it, and how they get in plain view.

Exporters hold weights as initializers or in Constant nodes, and put Identity and Transpose between them and the nodes
that take them. Nothing here looks through arithmetic: what is found is the weight itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from worker.loading.onnx_graph import FLOATS, constant_tensor
from worker.vetting.onnx import graphs, subgraphs

# Which inputs of an operator can be weights, and what torch calls the layer.
WEIGHTS: dict[str, tuple[tuple[int, ...], str]] = {
    "Conv": ((1,), "Conv"),
    "ConvTranspose": ((1,), "ConvTranspose"),
    "Gemm": ((0, 1), "Linear"),
    "MatMul": ((0, 1), "Linear"),
    "FusedMatMul": ((0, 1), "Linear"),
    "Attention": ((1,), "Linear"),
    "Gather": ((0,), "Embedding"),
    "LSTM": ((1, 2), "LSTM"),
    "GRU": ((1, 2), "GRU"),
    "RNN": ((1, 2), "RNN"),
}
MIN_DIMENSIONS = 2
# Behind the type of a layer in a branch: it can be pruned, and the runtime's quantizer does not look there.
IN_A_BRANCH = " in a branch"

Place = tuple[int, str]
"""The number of a graph, in the order of `graphs`, and the name of a tensor that it holds."""


@dataclass(frozen=True)
class GraphWeight:
    """A weight of a graph: where it is held, what torch calls its layer, and its tensor; `inputs_first` where that has
    a row for each input rather than for each output."""

    place: Place
    kind: str
    tensor: TensorProto
    inputs_first: bool = False


def held_tensors(graph: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """Initializers and the tensors of Constant nodes of one graph, by the name of the value, to be changed in place."""
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.output:
            made = _as_tensor(node)
            if made is not None:
                yield node.output[0], made


def set_values(tensor: TensorProto, values: np.ndarray) -> None:
    """Gives a tensor of the file other numbers, in its own type."""
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    for field in ("float_data", "double_data", "int32_data", "int64_data", "uint64_data"):
        tensor.ClearField(field)
    tensor.raw_data = np.ascontiguousarray(values.astype(dtype)).tobytes()


def replace_parts(parts: Any, new: Sequence[Any]) -> None:
    """Puts other parts in a repeated field; those that it had go with it."""
    copies = [type(part).FromString(part.SerializeToString()) for part in new]
    del parts[:]
    parts.extend(copies)


def used_names(graph: GraphProto) -> set[str]:
    """The values that anything reads: nodes, also in subgraphs, and outputs."""
    names = {name for part in graphs(graph) for node in part.node for name in node.input}
    return names | {value.name for part in graphs(graph) for value in part.output}


def drop_unused(graph: GraphProto, before: set[str]) -> None:
    """Takes out of a graph what was read before and is no more, and what only that was computed of."""
    while gone := before - used_names(graph):
        for tensor in [tensor for tensor in graph.initializer if tensor.name in gone]:
            graph.initializer.remove(tensor)
        for node in [node for node in graph.node if node.output and gone.issuperset(node.output)]:
            graph.node.remove(node)
        before = before - gone


def count_parameters(proto: ModelProto) -> int:
    """Floating-point numbers in the tensors of a file; single ones are no parameters."""
    return sum(
        int(np.prod(tensor.dims, dtype=int))
        for graph in graphs(proto.graph)
        for _, tensor in held_tensors(graph)
        if tensor.data_type in FLOATS and len(tensor.dims) > 0
    )


def flattened(proto: ModelProto) -> ModelProto:
    """A copy, not to be run, whose main graph lists the tensors and nodes of all graphs: for counting."""
    flat = ModelProto()
    flat.CopyFrom(proto)
    inner = list(graphs(flat.graph))[1:]
    _lift_constants(flat.graph)
    taken = {tensor.name for tensor in flat.graph.initializer}
    for graph in inner:
        _lift_constants(graph)
        for tensor in graph.initializer:
            lifted = flat.graph.initializer.add()
            lifted.CopyFrom(tensor)
            while lifted.name in taken:  # branches may use a name each for itself
                lifted.name += "'"
            taken.add(lifted.name)
        flat.graph.node.extend(graph.node)
    return flat


def find_weights(proto: ModelProto) -> Iterator[GraphWeight]:
    """Every weight of the graph and of those in it, once. A branch may take a weight of the graph around it."""
    seen: set[Place] = set()
    for number, graph, known in scopes(proto):
        makers = {name: node for node in graph.node for name in node.output}
        for node in graph.node:
            positions, kind = WEIGHTS.get(node.op_type, ((), ""))
            for name in (node.input[position] for position in positions if position < len(node.input)):
                place, tensor = known.get(source_of(name, makers), ((-1, ""), TensorProto()))
                if place in seen or tensor.data_type not in FLOATS or len(tensor.dims) < MIN_DIMENSIONS:
                    continue
                seen.add(place)
                dimensions = f"{len(tensor.dims) - 2}d" if kind.startswith("Conv") else ""
                what = f"{kind}{dimensions}{IN_A_BRANCH if number else ''}"
                yield GraphWeight(place, what, tensor, _inputs_first(node, name, tensor, makers))


def _inputs_first(node: NodeProto, name: str, tensor: TensorProto, makers: Mapping[str, NodeProto]) -> bool:
    """Products multiply rows with a matrix [inputs, outputs], unless it is transposed on its way or by Gemm."""
    if node.op_type == "ConvTranspose":
        return True
    if node.op_type not in ("MatMul", "FusedMatMul", "Gemm", "Attention") or len(tensor.dims) != MIN_DIMENSIONS:
        return False
    turned = any(attribute.name in ("transB",) and attribute.i for attribute in node.attribute)
    while (maker := makers.get(name)) is not None and maker.op_type in ("Identity", "Transpose"):
        turned ^= maker.op_type == "Transpose"
        name = maker.input[0]
    return not turned


def source_of(name: str, makers: Mapping[str, NodeProto]) -> str:
    """The value that a value is, seen through Identity and Transpose."""
    while (node := makers.get(name)) is not None and node.op_type in ("Identity", "Transpose"):
        name = node.input[0]
    return name


def plain_weights(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Puts the named tensors, under other names, right at the nodes that take them; Constant nodes become initializers.

    That is what ONNX Runtime's quantizer understands; it also tells nodes apart by their names. `names` says what a
    tensor is to be called.
    """
    _lift_constants(graph)
    _name_nodes(graph)
    before = used_names(graph)
    makers = {name: node for node in graph.node for name in node.output}
    held = {tensor.name: tensor for tensor in graph.initializer}
    placed: dict[str, str] = {}
    occupied = before | {name for node in graph.node for name in node.output}
    for node in graph.node:
        for position in WEIGHTS.get(node.op_type, ((), ""))[0]:
            taken = node.input[position] if position < len(node.input) else ""
            source = source_of(taken, makers)
            if source not in names or taken == source == names[source]:
                continue
            if taken not in placed:
                placed[taken] = free_name(names[source], occupied)
                values = _turned(numpy_helper.to_array(held[source]), taken, makers)
                graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), placed[taken]))
            node.input[position] = placed[taken]
    drop_unused(graph, before)
    held_now = {tensor.name for tensor in graph.initializer}
    for value in [value for value in graph.input if value.name in held_now]:  # as files before IR version 4 have it
        graph.input.remove(value)


def scopes(proto: ModelProto) -> Iterator[tuple[int, GraphProto, dict[str, tuple[Place, TensorProto]]]]:
    """The graphs in the order of `graphs`, with their numbers and the tensors that are known in them, by name."""
    return _nested(proto.graph, count(), {})


def _nested(
    graph: GraphProto, numbers: count[int], around: Mapping[str, tuple[Place, TensorProto]]
) -> Iterator[tuple[int, GraphProto, dict[str, tuple[Place, TensorProto]]]]:
    number = next(numbers)
    known = {**around, **{name: ((number, name), tensor) for name, tensor in held_tensors(graph)}}
    yield number, graph, known
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _nested(inner, numbers, known)


def free_name(name: str, occupied: set[str]) -> str:
    """The name, or another one where a value has it already; from now on one has."""
    free = next(n for n in chain((name,), (f"{name}_{i}" for i in count(2))) if n not in occupied)
    occupied.add(free)
    return free


def _name_nodes(graph: GraphProto) -> None:
    """Gives every node a name of its own."""
    taken: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            node.name = free_name(f"{node.op_type}_{index}", taken)
        taken.add(node.name)


def _turned(values: np.ndarray, name: str, makers: Mapping[str, NodeProto]) -> np.ndarray:
    """A tensor as the transpositions on the way to a value turn it."""
    turns = []
    while (node := makers.get(name)) is not None:
        if node.op_type == "Transpose":
            turns.append(next((tuple(attribute.ints) for attribute in node.attribute), None))
        name = node.input[0]
    for order in reversed(turns):
        values = values.transpose(order)
    return values


def _lift_constants(graph: GraphProto) -> None:
    """Makes initializers of the tensors in Constant nodes, in place."""
    constants = [node for node in graph.node if node.op_type == "Constant" and _as_tensor(node) is not None]
    for node in constants:
        lifted = graph.initializer.add()
        lifted.CopyFrom(node.attribute[0].t)
        lifted.name = node.output[0]
    for node in constants:
        graph.node.remove(node)


def _as_tensor(node: NodeProto) -> TensorProto | None:
    """The tensor of a Constant node, whose number or numbers become one where it holds those; None for text."""
    (attribute,) = node.attribute
    if attribute.name != "value":
        if attribute.name not in ("value_float", "value_floats", "value_int", "value_ints"):
            return None
        tensor = constant_tensor(node)
        attribute.Clear()
        attribute.name, attribute.type = "value", AttributeProto.TENSOR
        attribute.t.CopyFrom(tensor)
    return attribute.t
