"""Factors moved between layers of a graph: it gives the same, and its weights reach alike from channel to channel."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, helper

from app.contract.spec import Quantize
from tests.worker.techniques.quantization.static.graphs import floats, graph_of, run
from worker.data.batch import Batch
from worker.evaluation.layers import sqnr_db
from worker.techniques.quantization.calibration import Samples
from worker.techniques.quantization.graph import constants
from worker.techniques.quantization.onnx_int8 import quantize_file
from worker.techniques.quantization.static.equalization import equalize

LAYERS = ("first", "second", "third")


def uneven(*shape: int, axis: int = 0) -> np.ndarray:
    """Noise whose places along an axis reach differently far, by a factor of hundreds."""
    reach = np.exp(2 * floats(shape[axis])).reshape([-1 if own == axis else 1 for own in range(len(shape))])
    return floats(*shape) * reach


def node(kind: str, given: list[str], made: str, name: str = "", **fields: Any) -> Any:
    return helper.make_node(kind, given, [made], name, **fields)


def pair(
    between: list[Any], second: str = "b", picture: bool = True, outputs: tuple[str, ...] = ("y",), **fields: Any
) -> ModelProto:
    """Two convolutions, or products, with nodes between them that lead from `a` to `b`, or what `second` reads."""
    if picture:
        given = {"w": uneven(6, 3, 3, 3), "c": uneven(6), "v": floats(4, 6, 1, 1), "d": floats(4)}
        nodes = [node("Conv", ["x", "w", "c"], "a", "first", pads=[1, 1, 1, 1])]
        nodes += [*between, node("Conv", [second, "v", "d"], "y", "second")]
        shape: list[int | str] = ["n", 3, 8, 8]
    else:
        given = {"w": uneven(3, 6, axis=1), "c": uneven(6), "v": floats(6, 4), "d": floats(4)}
        nodes = [node("Gemm", ["x", "w", "c"], "a", "first")]
        nodes += [*between, node("Gemm", [second, "v", "d"], "y", "second")]
        shape = ["n", 3]
    return graph_of(nodes, given | fields, shape, list(outputs))


def equalized(proto: ModelProto, chosen: tuple[str, ...] = LAYERS) -> tuple[ModelProto, list[dict[str, Any]]]:
    own = copy.deepcopy(proto)
    return own, equalize(own, chosen)


def same(proto: ModelProto, other: ModelProto, shape: tuple[int, ...]) -> None:
    value = floats(*shape)
    exact = run(proto, value)
    np.testing.assert_allclose(run(other, value), exact, atol=1e-5 * np.abs(exact).max())


def reach(value: np.ndarray, axis: int) -> np.ndarray:
    found: np.ndarray = np.abs(np.moveaxis(value, axis, 0)).reshape(value.shape[axis], -1).max(1)
    return found


BETWEEN = {
    "nothing": [node("Identity", ["a"], "b")],
    "relu": [node("Relu", ["a"], "b")],
    "leaky": [node("LeakyRelu", ["a"], "b", alpha=0.2)],
    "prelu": [node("PRelu", ["a", "slope"], "b")],
    "max": [node("Relu", ["a"], "r"), node("MaxPool", ["r"], "b", kernel_shape=[2, 2], strides=[2, 2])],
    "mean": [node("AveragePool", ["a"], "b", kernel_shape=[3, 3], pads=[1, 1, 1, 1])],
}


@pytest.mark.parametrize("way", BETWEEN)
def test_convolutions_give_the_same_and_reach_alike(way: str) -> None:
    proto = pair(BETWEEN[way], slope=np.array([0.25], np.float32))
    own, rows = equalized(proto)
    same(proto, own, (5, 3, 8, 8))
    before, after = constants(proto.graph, ["w", "v"]), constants(own.graph, ["w", "v"])
    made, read = reach(before["w"], 0), reach(before["v"], 1)
    np.testing.assert_allclose(reach(after["w"], 0), np.sqrt(made * read), rtol=1e-2)
    np.testing.assert_allclose(reach(after["v"], 1), np.sqrt(made * read), rtol=1e-2)
    scale = np.sqrt(made / read)
    assert rows == [
        {
            "first": "w",
            "second": "v",
            "least_factor": pytest.approx(scale.min(), rel=1e-3),
            "largest_factor": pytest.approx(scale.max(), rel=1e-3),
        }
    ]


@pytest.mark.parametrize("turned", [False, True])
def test_products(turned: bool) -> None:
    proto = pair([node("Relu", ["a"], "b")], picture=False)
    if turned:
        for one in proto.graph.node:
            if one.op_type == "Gemm":
                one.attribute.append(helper.make_attribute("transB", 1))
        for one in proto.graph.initializer:
            if len(one.dims) == 2:
                value = constants(proto.graph, [one.name])[one.name].T
                one.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(value), one.name))
    own, rows = equalized(proto)
    same(proto, own, (5, 3))
    after = constants(own.graph, ["w", "v"])
    np.testing.assert_allclose(reach(after["w"], 1 - turned), reach(after["v"], turned), rtol=1e-2)
    assert len(rows) == 1


def test_a_matrix_product_takes_the_sum_behind_it_along() -> None:
    nodes = [
        node("MatMul", ["x", "w"], "m", "first"),
        node("Add", ["c", "m"], "a", "sum"),
        node("Relu", ["a"], "r"),
        node("MatMul", ["r", "v"], "y", "second"),
    ]
    given = {"w": uneven(3, 6, axis=1), "c": uneven(6), "v": floats(6, 4)}
    proto = graph_of(nodes, given, ["n", 2, 3], ["y"])
    own, rows = equalized(proto)
    same(proto, own, (5, 2, 3))
    assert len(rows) == 1
    proto.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(floats(2, 6), "c"))
    assert equalized(proto) == (proto, []), "a sum that differs from place to place is no bias"


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_groups_on_either_side(groups: int, kind: str) -> None:
    """A chain in which the middle layer has groups: all of one, of several, or a channel each."""
    middle = (6, 12 // groups, 3, 3) if kind == "ConvTranspose" else (12, 6 // groups, 3, 3)
    nodes = [
        node("Conv", ["x", "w"], "a", "first"),
        node("Relu", ["a"], "b"),
        node(kind, ["b", "m", "c"], "e", "second", group=groups),
        node("Relu", ["e"], "f"),
        node(kind, ["f", "v"], "y", "third"),
    ]
    last = (12, 4, 1, 1) if kind == "ConvTranspose" else (4, 12, 1, 1)
    given = {"w": uneven(6, 3, 1, 1), "m": uneven(*middle), "c": uneven(12), "v": floats(*last)}
    proto = graph_of(nodes, given, ["n", 3, 8, 8], ["y"])
    own, rows = equalized(proto)
    same(proto, own, (5, 3, 8, 8))
    assert [(row["first"], row["second"]) for row in rows] == [("w", "m"), ("m", "v")]
    after = constants(own.graph, ["w", "m", "v"])
    outputs = reach(after["m"], 0) if kind == "Conv" else _outputs(after["m"], groups)
    np.testing.assert_allclose(outputs, reach(after["v"], 0 if kind == "ConvTranspose" else 1), rtol=1e-2)


def _outputs(value: np.ndarray, groups: int) -> np.ndarray:
    """How far the outputs of a transposed convolution reach, group after group."""
    return np.concatenate([reach(part, 1) for part in np.split(value, groups)])


@pytest.mark.parametrize(
    "proto",
    [
        pair([node("Clip", ["a", "zero", "six"], "b")], zero=np.float32(0), six=np.float32(6)),
        pair([node("Sigmoid", ["a"], "b")]),
        pair([node("Add", ["a", "e"], "b")], e=np.ones((6, 1, 1), np.float32)),
        pair([node("Relu", ["a"], "b")], outputs=("y", "b")),
        pair([node("Relu", ["a"], "b"), node("Sigmoid", ["b"], "z")], outputs=("y", "z")),
        pair([node("PRelu", ["e", "a"], "b")], e=np.ones((6, 8, 8), np.float32)),
        pair([node("MaxPool", ["a"], "b", kernel_shape=[2, 2])], outputs=("y", "a")),
        pair([], second="a", outputs=("y", "w")),
    ],
    ids=["clip", "sigmoid", "sum", "output", "two readers", "slope", "output before", "weight read elsewhere"],
)
def test_what_does_not_let_factors_through(proto: ModelProto) -> None:
    own, rows = equalized(proto)
    assert rows == []
    assert own == proto


def test_a_bias_that_others_read_too() -> None:
    proto = pair([node("Relu", ["a"], "b")], picture=False)
    proto.graph.node[2].input[2] = "c"
    proto.graph.node[2].input[1] = "u"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(floats(6, 6), "u"))
    own, rows = equalized(proto)
    assert (own, rows) == (proto, [])


def test_a_tensor_that_a_branch_reads() -> None:
    proto = pair([node("Relu", ["a"], "b")])
    branch = helper.make_graph(
        [helper.make_node("Identity", ["b"], ["i"])], "branch", [], [helper.make_empty_tensor_value_info("i")]
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    proto.graph.node.append(helper.make_node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch))
    assert equalized(proto) == (proto, [])


def test_a_product_whose_last_dimension_is_pooled() -> None:
    """Pooling goes through places, and those are the channels of a matrix product."""
    nodes = [
        node("MatMul", ["x", "w"], "a", "first"),
        node("AveragePool", ["a"], "b", kernel_shape=[3], pads=[1, 1]),
        node("MatMul", ["b", "v"], "y", "second"),
    ]
    proto = graph_of(nodes, {"w": uneven(3, 6, axis=1), "v": floats(6, 4)}, ["n", 2, 3], ["y"])
    assert equalized(proto) == (proto, [])


def test_layers_that_stay_floats_and_layers_of_other_sizes() -> None:
    proto = pair([node("Relu", ["a"], "b")])
    assert equalized(proto, ("first",)) == (proto, [])
    assert equalized(proto, ("second",)) == (proto, [])


def test_dead_channels_keep_their_biases() -> None:
    proto = pair([node("Relu", ["a"], "b")])
    for name, place in (("w", (2,)), ("v", (slice(None), 4))):
        tensor = next(one for one in proto.graph.initializer if one.name == name)
        value = constants(proto.graph, [name])[name].copy()
        value[place] = 0
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
    own, _ = equalized(proto)
    same(proto, own, (5, 3, 8, 8))
    before, after = constants(proto.graph, ["c"])["c"], constants(own.graph, ["c"])["c"]
    assert list(after[[2, 4]]) == list(before[[2, 4]])


def mobile() -> ModelProto:
    """Expansion, depthwise convolution, projection; the depthwise channels reach very differently far, as where a
    batch norm was folded into them."""
    nodes = [
        node("Conv", ["x", "w", "wb"], "a", "first"),
        node("Relu", ["a"], "b", "relu"),
        node("Conv", ["b", "m", "mb"], "e", "second", group=32, pads=[1, 1, 1, 1]),
        node("Relu", ["e"], "f", "relu too"),
        node("Conv", ["f", "v", "vb"], "y", "third"),
    ]
    reach = np.exp(1.5 * floats(32))
    given = {"w": floats(32, 8, 1, 1), "wb": floats(32), "m": floats(32, 1, 3, 3) * reach.reshape(-1, 1, 1, 1)}
    given |= {"mb": floats(32) * reach, "v": floats(8, 32, 1, 1) / reach.reshape(-1, 1, 1), "vb": floats(8)}
    return graph_of(nodes, given, ["n", 8, 10, 10], ["y"])


def test_a_depthwise_chain_with_one_step_a_weight_gains_many_decibels(tmp_path: Path) -> None:
    source = tmp_path / "mobile.onnx"
    proto = mobile()
    onnx.save_model(proto, str(source))
    values = [floats(8, 8, 10, 10) for _ in range(4)]
    samples = Samples(lambda: [Batch((torch.from_numpy(value),), None) for value in values], ["x"], 4)
    fresh = floats(16, 8, 10, 10)
    noise = {}
    for wanted in (False, True):
        target = tmp_path / f"{wanted}.onnx"
        step = Quantize(per_channel=False, equalize=wanted)
        details = quantize_file(source, target, step, samples, ()).details
        noise[wanted] = sqnr_db(run(proto, fresh), run(onnx.load(target), fresh))
        pairs = [(row["first"], row["second"]) for row in details.get("equalized", [])]  # type: ignore[union-attr]
        assert pairs == ([("w", "m"), ("m", "v")] if wanted else [])
        assert ("equalized" in details) == wanted
    assert noise[True] > noise[False] + 8
