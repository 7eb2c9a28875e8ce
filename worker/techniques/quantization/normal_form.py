"""A graph in the form that ONNX Runtime's quantizer takes: it tells nodes by their names, expects the bias of a product
to be a vector of its outputs, and forgets what that is multiplied by."""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from worker.techniques.quantization.graph import attributes, constants, free_name
from worker.techniques.quantization.static.products import BIAS


def normalize(proto: ModelProto) -> None:
    """In place; what the graph gives stays the same."""
    _name_nodes(proto.graph)
    shapes = {one.name: tuple(one.dims) for one in proto.graph.initializer if one.data_type == TensorProto.FLOAT}
    for node in list(proto.graph.node):
        if node.op_type == "Gemm" and len(node.input) > BIAS and node.input[1] in shapes and node.input[BIAS] in shapes:
            own = attributes(node)
            outputs = shapes[node.input[1]][0 if own.get("transB") else 1]
            if shapes[node.input[BIAS]] != (outputs,) or own.get("beta", 1.0) != 1.0:
                _give_vector(proto.graph, node, outputs)


def _name_nodes(graph: GraphProto) -> None:
    """Each keeps its name, if it has one and is the first that has it; others are numbered."""
    taken = {""}
    for node in graph.node:
        base, number = node.name or node.op_type, 0
        while node.name in taken:
            number += 1
            node.name = f"{base}_{number}"
        taken.add(node.name)


def _give_vector(graph: GraphProto, node: NodeProto, outputs: int) -> None:
    """A bias that is the same for all rows becomes a vector [outputs], any other one a sum behind the product."""
    beta = np.float32(attributes(node).get("beta", 1.0))
    value = beta * constants(graph, {node.input[BIAS]})[node.input[BIAS]]
    own = free_name(graph, f"{node.input[BIAS]}_own")
    if value.size in (1, *value.shape[-1:]):
        value = np.broadcast_to(value.reshape(-1), (outputs,))
        node.input[BIAS] = own
    else:
        made, product = node.output[0], free_name(graph, f"{node.output[0]}_product")
        node.output[0] = product
        del node.input[BIAS:]
        total = helper.make_node("Add", [product, own], [made], free_name(graph, f"{node.name}_bias"))
        graph.node.insert(list(graph.node).index(node) + 1, total)
    kept = [attribute for attribute in node.attribute if attribute.name != "beta"]
    del node.attribute[:]
    node.attribute.extend(kept)
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), own))
