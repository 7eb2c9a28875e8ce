"""An ONNX graph as a trainable torch module: an fx graph, operator by operator through one table.

Operators with constant weights become layers of `torch.nn`, so that pruning, masks, training and export work on them as
on modules written by hand; the others become functions. Computations of shapes are done in numbers
(`onnx_ops.host`), so that the batch stays open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from torch import Tensor, fx, nn

from worker.loading.onnx_ops.build import Argument, Builder, Constant, read_tensor
from worker.loading.onnx_ops.errors import Unsupported
from worker.loading.onnx_ops.host import tensor
from worker.loading.onnx_ops.node import Node
from worker.loading.onnx_ops.origins import Origin
from worker.loading.onnx_ops.table import TABLE, Build
from worker.vetting.boundary import first_line
from worker.vetting.onnx import graphs, skeleton, subgraphs

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})


class NotImportable(Exception):
    """Why a graph has no form as a trainable module; a sentence."""


@dataclass(frozen=True)
class Imported:
    """A graph as a module, and where its weights came from.

    `pinned` are the tensors of the file that more than the module's weights was made of.
    """

    module: fx.GraphModule
    origins: tuple[Origin, ...]
    pinned: frozenset[str]


def import_graph(
    proto: ModelProto,
    output: str,
    head: nn.Module | None = None,
    *,
    fixed_batch: bool = False,
    table: Mapping[str, Build] = TABLE,
) -> Imported:
    """The part of the graph that computes the value `output`, as a module of the graph's inputs in their order.

    `head` is put behind it, as a module of it. With `fixed_batch`, the file's batch is 1 and shapes that begin with 1
    are taken to mean the batch. `table` has the operators. Raises NotImportable, naming the operator.
    """
    graph = proto.graph
    opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
    builder = Builder(inferred_shapes(proto), frozenset(t.name for t in graph.initializer if _is_weight(t)))
    builder.fixed_batch = fixed_batch
    builder.uses = _uses(graph)
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    _place_inputs(builder, graph, initializers.keys())
    needed = _needed(graph, output)
    _refuse_control_flow(node for _, node in needed)
    for index, proto_node in needed:
        for name in proto_node.input:
            if name in initializers and name not in builder.values:
                builder.values[name] = Constant(read_tensor(initializers[name]), name)
        _import_node(builder, Node(builder, proto_node, index, opset), table)
    result = builder.values.get(output)
    if not isinstance(result, fx.Node):
        raise NotImportable(f"Its output {output[:200]!r} does not depend on its inputs.")
    result = builder.graph.call_function(tensor, (result,))
    if head is not None:
        result = builder.graph.call_module(builder.layer("output_head", head), (result,))
    builder.graph.output(result)
    module = fx.GraphModule(builder.root, builder.graph)
    if module.graph.eliminate_dead_code():
        module.recompile()
    return Imported(module, tuple(builder.origins), frozenset(builder.pinned))


def failing_operator(module: fx.GraphModule, inputs: Sequence[Tensor]) -> str:
    """Which operator of the file fails on these inputs, and how; for a message."""
    found = _Watched(module)
    try:
        with torch.no_grad():
            found.run(*inputs)
    except Exception as failure:  # what torch throws where a shape does not fit
        said = str(failure).partition("\n")[0]  # fx adds where it was
        reason = said if isinstance(failure, Unsupported) else first_line(failure)
        return f"operator {found.current} {reason}"
    return "it cannot be said where"


class _Watched(fx.Interpreter):
    """Runs a module node by node, and knows which one it is at."""

    current = ""

    def run_node(self, n: fx.Node) -> Any:
        self.current = n.meta.get("onnx", n.name)
        return super().run_node(n)


def model_inputs(graph: GraphProto) -> list[onnx.ValueInfoProto]:
    """What has to be fed: before IR version 4 the weights were listed among the inputs as well."""
    held = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in held]


def constant_tensor(node: NodeProto) -> TensorProto:
    """The tensor of a Constant node, whichever attribute holds it. Raises Unsupported for text."""
    (attribute,) = node.attribute
    if attribute.HasField("t"):
        return attribute.t
    value = onnx.helper.get_attribute_value(attribute)
    kinds = {"value_float": "float32", "value_floats": "float32", "value_int": "int64", "value_ints": "int64"}
    if attribute.name not in kinds:
        raise Unsupported("is no tensor of numbers")
    return numpy_helper.from_array(np.asarray(value, dtype=kinds[attribute.name]))


def _place_inputs(builder: Builder, graph: GraphProto, initializers: Any) -> None:
    """Placeholders under names of ours, in the order of the graph's inputs."""
    for number, value in enumerate(model_inputs(graph)):
        placeholder = builder.graph.placeholder(f"input_{number}")
        builder.values[value.name] = placeholder
        builder.anchor = builder.anchor or placeholder


def _import_node(builder: Builder, node: Node, table: Mapping[str, Build]) -> None:
    """Puts the values of the node's outputs among the builder's."""
    before = len(builder.graph.nodes)
    try:
        outputs = _outputs(node, table)
    except Unsupported as reason:
        raise NotImportable(f"Operator {_title(node.proto)} {reason}.") from reason
    except Exception as failure:  # what a hostile attribute provokes in torch or in a builder
        raise NotImportable(f"Operator {_title(node.proto)} cannot be imported: {first_line(failure)}.") from failure
    for made in islice(reversed(builder.graph.nodes), len(builder.graph.nodes) - before):
        made.meta["onnx"] = _title(node.proto)
    for name, value in zip(node.proto.output, outputs, strict=False):
        if name:
            builder.values[name] = value


def _outputs(node: Node, table: Mapping[str, Build]) -> Sequence[Argument]:
    if node.op == "Constant":
        return [Constant(read_tensor(constant_tensor(node.proto)), node.proto.output[0])]
    kind = f"{node.proto.domain}.{node.op}" if node.proto.domain else node.op
    if kind not in table:
        raise Unsupported("has no trainable form here")
    result = table[kind](node)
    return result if isinstance(result, list) else [result]  # a tuple is one host value


def _needed(graph: GraphProto, output: str) -> list[tuple[int, NodeProto]]:
    """The nodes that a value depends on, with their numbers, in the graph's order."""
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    pending, found = [output], set()
    while pending:
        index = makers.get(pending.pop())
        if index is not None and index not in found:
            found.add(index)
            node = graph.node[index]
            pending.extend(node.input)
            for inner in subgraphs(node):
                pending.extend(name for part in graphs(inner) for deep in part.node for name in deep.input)
    return [(index, graph.node[index]) for index in sorted(found)]


def _refuse_control_flow(nodes: Iterator[NodeProto]) -> None:
    found = sorted({node.op_type for node in nodes if node.op_type in _CONTROL_FLOW})
    if found:
        raise NotImportable(
            f"Its graph holds control flow ({', '.join(found)}), which is not trained: what runs is decided while it "
            "runs. Export the model without it (torch.onnx.export with dynamo=True unrolls fixed branches)."
        )


def _uses(graph: GraphProto) -> Counter[str]:
    """How often each value is read, by nodes (also of subgraphs) and as an output."""
    counted = Counter(name for part in graphs(graph) for node in part.node for name in node.input)
    counted.update(value.name for part in graphs(graph) for value in part.output)
    return counted


def inferred_shapes(proto: ModelProto) -> dict[str, tuple[int | None, ...]]:
    """What shape inference knows; None for an open dimension."""
    graph = onnx.shape_inference.infer_shapes(skeleton(proto)).graph
    return {
        value.name: tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape")
        for shape in (value.type.tensor_type.shape,)
    }


def _is_weight(proto: TensorProto) -> bool:
    return proto.data_type in FLOATS and np.prod(proto.dims, dtype=int) > 1


def _title(node: NodeProto) -> str:
    name = f" ({node.name[:100]!r})" if node.name else ""
    return f"{node.op_type[:80]}{name}"
