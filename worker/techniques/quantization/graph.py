"""What is asked of ONNX graphs on the way to integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import count
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, helper, numpy_helper


def attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes of a node by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def uses(graph: GraphProto) -> Counter[str]:
    """How often each tensor is read: by nodes, also in branches, and as an output of the graph."""
    found = Counter(value.name for value in graph.output)
    for node in graph.node:
        found.update(node.input)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                found.update(uses(inner))
    return found


def sole_readers(graph: GraphProto) -> dict[str, NodeProto]:
    """The node that reads a tensor, of each tensor that is read once and by a node of the graph itself."""
    counts = uses(graph)
    return {name: node for node in graph.node for name in node.input if counts[name] == 1}


def constants(graph: GraphProto, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The values of these initializers."""
    wanted = set(names)
    return {one.name: numpy_helper.to_array(one) for one in graph.initializer if one.name in wanted}


def free_name(graph: GraphProto, name: str) -> str:
    """A name that nothing in the graph has, this one or one made of it."""
    nodes = {known for node in graph.node for known in (node.name, *node.input, *node.output)}
    taken = nodes | {one.name for one in (*graph.initializer, *graph.input, *graph.value_info)}
    return next(own for number in count() if (own := f"{name}_{number}" if number else name) not in taken)


def replace_constant(graph: GraphProto, name: str, value: np.ndarray) -> None:
    """Gives an initializer other values."""
    tensor = next(one for one in graph.initializer if one.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name))
