"""Takes out of an ONNX graph what the exporter writes for its own debugging: stack traces, paths, symbolic shapes.

Each node of a fresh export carries a stack trace with the paths of the machine it was made on; on a small network
these are most of the file.
"""

from __future__ import annotations

from typing import Any

from onnx import AttributeProto, GraphProto, ModelProto


def strip(proto: ModelProto) -> None:
    """Removes metadata, docstrings and inferred shapes of inner values, in place; they compute nothing."""
    _clear(proto)
    for function in proto.functions:
        _clear(function)
        _strip_nodes(function)
    _strip_graph(proto.graph)


def _strip_graph(graph: GraphProto) -> None:
    _clear(graph)
    del graph.value_info[:]
    for part in (*graph.input, *graph.output, *graph.initializer):
        _clear(part)
    _strip_nodes(graph)


def _strip_nodes(holder: Any) -> None:
    for node in holder.node:
        _clear(node)
        for attribute in node.attribute:
            attribute.doc_string = ""
            if attribute.type == AttributeProto.GRAPH:
                _strip_graph(attribute.g)
            for graph in attribute.graphs:
                _strip_graph(graph)


def _clear(part: Any) -> None:
    part.doc_string = ""
    del part.metadata_props[:]
