"""Relu and Clip, which ONNX Runtime's quantizer leaves out: it trusts that the range of what they give clips as they
do, and does not look at it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import GraphProto, NodeProto

from worker.techniques.quantization.graph import attributes, constants
from worker.techniques.quantization.static.ranges_math import LEVELS, Range


def reaches_past(graph: GraphProto, ranges: Mapping[str, Range]) -> bool:
    """Whether a range has codes for what the Relu or Clip that gives the tensor does not let through.

    One that was learned may: it has grown, or is shared with a tensor that nothing clips.
    """
    bounds = constants(graph, {name for node in graph.node if node.op_type == "Clip" for name in node.input[1:]})
    return any(
        _past(ranges[node.output[0]], *_between(node, bounds))
        for node in graph.node
        if node.op_type in ("Relu", "Clip") and node.output[0] in ranges
    )


def _past(own: Range, least: float, most: float) -> bool:
    """By more than half a step: the bound itself is rounded to a code that is no further out."""
    half = (own.high - own.low) / (LEVELS - 1) / 2
    return own.low < least - half or own.high > most + half


def _between(node: NodeProto, bounds: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """The least and the greatest that a node gives."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    return _bound(node, 1, "min", -np.inf, bounds), _bound(node, 2, "max", np.inf, bounds)


def _bound(node: NodeProto, place: int, name: str, none: float, bounds: Mapping[str, np.ndarray]) -> float:
    """Of a Clip: the input at a place or, before opset 11, an attribute. One that is computed lets nothing through, for
    all that is known."""
    given = node.input[place] if len(node.input) > place else ""
    if given:
        return float(bounds[given]) if given in bounds else -none
    return float(attributes(node).get(name, none))
