"""Where learned ranges go in a graph, and what a tensor has of several."""

from __future__ import annotations

import pytest
from onnx import GraphProto, NodeProto, helper

from tests.worker.techniques.quantization.static.graphs import floats, graph_of
from worker.techniques.quantization.static.learned import Learned
from worker.techniques.quantization.static.ranges_math import Range

FIRST, SECOND, BOTH = Range(-1.0, 2.0), Range(0.0, 3.0), Range(-1.0, 3.0)
LEARNED = Learned(ranges={"first": FIRST, "second": SECOND})


def product(given: str, weight: str, made: str) -> NodeProto:
    return helper.make_node("MatMul", [given, weight], [made], made)


def graph(*nodes: NodeProto) -> GraphProto:
    weights = {name: floats(8, 8) for name in ("first", "second", "other")}
    return graph_of(list(nodes), weights, ["n", 8], ["y", "z"]).graph


def test_a_tensor_that_one_layer_reads_has_its_range() -> None:
    own = graph(product("x", "first", "h"), product("h", "second", "y"), product("h", "other", "z"))
    assert LEARNED.ranges_in(own) == {"x": FIRST, "h": SECOND}


@pytest.mark.parametrize("order", [1, -1])
def test_a_tensor_that_two_read_holds_both(order: int) -> None:
    """Whichever comes first: layers whose inputs are computed twice are one tensor in a file."""
    nodes = [product("x", "first", "y"), product("x", "second", "z")][::order]
    assert LEARNED.ranges_in(graph(*nodes)) == {"x": BOTH}


@pytest.mark.parametrize("order", [1, -1])
def test_what_was_pooled_or_reshaped_has_one_range_with_what_it_was_made_of(order: int) -> None:
    """A value has one grid on both sides of such an operator."""
    between = [helper.make_node("Transpose", ["x"], ["t"]), helper.make_node("Flatten", ["t"], ["f"])]
    nodes = [product("x", "first", "y"), product("f", "second", "z")][::order]
    assert LEARNED.ranges_in(graph(*between, *nodes)) == {"x": BOTH, "t": BOTH, "f": BOTH}


def test_what_is_computed_is_another_tensor() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["r"]), product("x", "first", "y"), product("r", "second", "z")]
    assert LEARNED.ranges_in(graph(*nodes)) == {"x": FIRST, "r": SECOND}
