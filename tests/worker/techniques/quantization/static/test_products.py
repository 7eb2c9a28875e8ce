"""Products of a graph as matrices, against ONNX Runtime's own answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import GraphProto, helper

from tests.worker.techniques.quantization.static.graphs import floats, graph_of, run
from worker.techniques.quantization.graph import constants
from worker.techniques.quantization.static.products import products

TENSORS = ("x", "m", "a")


def by_columns(graph: GraphProto, value: np.ndarray) -> tuple[np.ndarray, Any]:
    """What the only product of a graph gives, [products, outputs], by its matrix and columns."""
    (product,) = products(graph, TENSORS)
    weight = constants(graph, [product.weight])[product.weight]
    rows = product.matrix(weight)
    kernel = weight.shape[2:] if product.node.op_type == "Conv" else ()
    found = product.columns(value, kernel) @ rows.T
    assert np.array_equal(product.unmatrix(rows, weight.shape), weight)
    return found.numpy(), product


@pytest.mark.parametrize("turned", [0, 1])
def test_gemm(turned: int) -> None:
    weight = floats(5, 7) if turned else floats(7, 5)
    proto = graph_of(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "n", transB=turned)],
        {"w": weight, "b": floats(5)},
        ["n", 7],
        ["y"],
    )
    value = floats(4, 7)
    found, product = by_columns(proto.graph, value)
    bias = constants(proto.graph, [product.bias])[product.bias]
    np.testing.assert_allclose(found + bias, run(proto, value), atol=1e-5)
    assert product.axis == 1 - turned


def test_matmul_with_a_sum_behind_it_has_a_bias() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], "n"), helper.make_node("Add", ["b", "m"], ["y"])]
    proto = graph_of(nodes, {"w": floats(7, 5), "b": floats(5)}, ["n", 3, 7], ["y"])
    value = floats(2, 3, 7)
    found, product = by_columns(proto.graph, value)
    assert product.bias == "b"
    bias = constants(proto.graph, ["b"])["b"]
    np.testing.assert_allclose((found + bias).reshape(2, 3, 5), run(proto, value), atol=1e-5)


@pytest.mark.parametrize("places", [1, 2])
@pytest.mark.parametrize(
    "fields",
    [{}, {"strides": 2}, {"dilations": 2}, {"pads": 1}, {"pads": 2, "strides": 2, "dilations": 2}],
    ids=lambda fields: ",".join(fields) or "plain",
)
def test_convolutions(places: int, fields: dict[str, int]) -> None:
    own = {name: [size] * (2 * places if name == "pads" else places) for name, size in fields.items()}
    if "pads" in own:
        own["pads"][0] = 0  # and not the same on all sides
    weight = floats(4, 3, *[3, 2][:places])
    node = helper.make_node("Conv", ["x", "w"], ["y"], "n", **own)
    proto = graph_of([node], {"w": weight}, ["n", 3, *["a", "b"][:places]], ["y"])
    value = floats(2, 3, *[11, 9][:places])
    found, product = by_columns(proto.graph, value)
    expected = np.moveaxis(run(proto, value), 1, -1).reshape(-1, 4)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert product.bias is None
    assert product.takes_bias


def test_what_is_no_product_of_its_own_weight() -> None:
    """Two that share a weight, two tensors, groups, a weight in front, a padding that is found while it runs."""
    shared = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["y"])]
    assert not list(products(graph_of(shared, {"w": floats(7, 7)}, ["n", 7], ["y"]).graph, TENSORS))
    tensors = [helper.make_node("MatMul", ["x", "x"], ["y"])]
    assert not list(products(graph_of(tensors, {}, [7, 7], ["y"]).graph, TENSORS))
    front = [helper.make_node("MatMul", ["w", "x"], ["y"])]
    assert not list(products(graph_of(front, {"w": floats(7, 7)}, [7, 7], ["y"]).graph, TENSORS))
    for fields in ({"group": 2}, {"auto_pad": "SAME_UPPER"}):
        weight = floats(4, 4 // fields.get("group", 1), 3)  # type: ignore[operator]
        node = helper.make_node("Conv", ["x", "w"], ["y"], **fields)
        assert not list(products(graph_of([node], {"w": weight}, ["n", 4, 9], ["y"]).graph, TENSORS))


def test_a_bias_that_others_read_too_is_not_its_own() -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["m"], "n"),
        helper.make_node("Add", ["m", "b"], ["y"]),
    ]
    (product,) = products(graph_of(nodes, {"w": floats(5, 5), "b": floats(5)}, ["n", 5], ["y"]).graph, TENSORS)
    assert product.bias is None
    assert torch.equal(product.matrix(np.eye(5, dtype=np.float32)), torch.eye(5))


def test_products_of_other_types_and_of_tensors_that_nobody_knows() -> None:
    whole = np.ones((5, 5), np.int64)
    proto = graph_of([helper.make_node("MatMul", ["x", "w"], ["y"], "n")], {"w": whole}, ["n", 5], ["y"])
    assert not list(products(proto.graph, TENSORS))
    known = graph_of([helper.make_node("MatMul", ["x", "w"], ["y"], "n")], {"w": floats(5, 5)}, ["n", 5], ["y"])
    assert not list(products(known.graph, ("y",)))
