"""Relu and Clip behind products, with ranges that reach past them: as a training leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, helper

from app.contract.spec import Quantize
from tests.worker.techniques.quantization.static.graphs import floats, graph_of, run
from worker.data.batch import Batch
from worker.evaluation.layers import sqnr_db
from worker.techniques.quantization.calibration import Samples
from worker.techniques.quantization.onnx_int8 import quantize_file
from worker.techniques.quantization.static.clipping import reaches_past
from worker.techniques.quantization.static.learned import Learned
from worker.techniques.quantization.static.ranges_math import Range

BOUNDS = {"low": np.array(0, np.float32), "six": np.array(6, np.float32), "one": np.array(1, np.float32)}


def clip(*inputs: str, **attributes: Any) -> NodeProto:
    return helper.make_node("Clip", ["h", *inputs], ["r"], "clip", **attributes)


RELU = helper.make_node("Relu", ["h"], ["r"], "relu")


@pytest.mark.parametrize(
    ("node", "own", "past"),
    [
        (RELU, Range(0.0, 9.0), False),
        (RELU, Range(-0.1, 9.0), True),
        (clip("low", "six"), Range(0.0, 6.0), False),
        (clip("low", "six"), Range(0.0, 6.01), False),  # by less than half a step
        (clip("low", "six"), Range(0.0, 6.5), True),
        (clip("low", "six"), Range(-1.0, 6.0), True),
        (clip("low"), Range(0.0, 99.0), False),
        (clip("", "six"), Range(-99.0, 6.0), False),
        (clip("one", "six"), Range(0.0, 6.0), True),  # zero is in every range
        (clip("low", "computed"), Range(0.0, 6.0), True),
        (clip(min=0.0, max=6.0), Range(0.0, 6.0), False),
        (clip(min=0.0, max=6.0), Range(0.0, 7.0), True),
        (clip(), Range(-9.0, 9.0), False),
        (helper.make_node("Sigmoid", ["h"], ["r"]), Range(-9.0, 9.0), False),
    ],
)
def test_which_ranges_reach_past_what_is_in_front(node: NodeProto, own: Range, past: bool) -> None:
    graph = graph_of([node], BOUNDS, ["n", 8], ["r"]).graph
    assert reaches_past(graph, {"r": own}) is past
    assert not reaches_past(graph, {"h": own})


@pytest.mark.parametrize(
    ("node", "own"), [(RELU, Range(-4.0, 8.0)), (clip("low", "six"), Range(0.0, 14.0))], ids=["relu", "clip"]
)
def test_the_file_clips_what_its_ranges_do_not(node: NodeProto, own: Range, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "first.weight"], ["h"], "first"),
        node,
        helper.make_node("MatMul", ["r", "second.weight"], ["y"], "second"),
    ]
    given = {"first.weight": floats(16, 16), "second.weight": floats(16, 4), **BOUNDS}
    proto = graph_of(nodes, given, ["n", 16], ["y"])
    onnx.save_model(proto, str(tmp_path / "float.onnx"))
    value = 2 * floats(64, 16)
    samples = Samples(lambda: [Batch((torch.from_numpy(value),), None)], ["x"], 1)
    learned = Learned(ranges={"second.weight": own})
    step = Quantize(equalize=False, smooth=False)
    quantize_file(tmp_path / "float.onnx", tmp_path / "int8.onnx", step, samples, (), None, learned)
    exact = run(proto, value)
    hidden = np.clip(value @ given["first.weight"], 0, 6 if node.op_type == "Clip" else own.high)
    expected = hidden @ given["second.weight"]  # of which 8 bits leave little out
    found = run(onnx.load(tmp_path / "int8.onnx"), value)
    assert sqnr_db(expected, found) > 20
    assert node.op_type == "Relu" or sqnr_db(exact, found) > 20


def test_without_such_ranges_they_are_left_to_the_runtime(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "first.weight"], ["h"], "first"),
        RELU,
        helper.make_node("MatMul", ["r", "second.weight"], ["y"], "second"),
    ]
    given = {"first.weight": floats(16, 16), "second.weight": floats(16, 4)}
    onnx.save_model(graph_of(nodes, given, ["n", 16], ["y"]), str(tmp_path / "float.onnx"))
    samples = Samples(lambda: [Batch((torch.from_numpy(floats(64, 16)),), None)], ["x"], 1)
    quantize_file(tmp_path / "float.onnx", tmp_path / "int8.onnx", Quantize(), samples, ())
    assert "Relu" not in {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
