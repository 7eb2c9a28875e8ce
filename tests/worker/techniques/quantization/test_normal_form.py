"""Graphs that the runtime's quantizer would stumble over, before and after, and as int8 files."""

from __future__ import annotations

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
from worker.techniques.quantization.normal_form import normalize
from worker.techniques.quantization.onnx_int8 import quantize_file

ROWS = 32


def as_int8(proto: ModelProto, value: np.ndarray, folder: Path, **fields: Any) -> ModelProto:
    source, target = folder / "float.onnx", folder / "int8.onnx"
    onnx.save_model(proto, str(source))
    samples = Samples(lambda: [Batch((torch.from_numpy(value),), None)], ["x"], 1)
    quantize_file(source, target, Quantize.model_validate(fields), samples, ())
    return onnx.load(target)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (), (1,), (1, 1), (ROWS, 1), (ROWS, 4)], ids=str)
@pytest.mark.parametrize("turned", [0, 1])
def test_biases_of_any_shape_times_a_half(shape: tuple[int, ...], turned: int, tmp_path: Path) -> None:
    weight = floats(4, 8) if turned else floats(8, 4)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], "g", transB=turned, beta=0.5)
    proto = graph_of([node], {"w": weight, "b": np.asarray(floats(*shape), np.float32)}, [ROWS, 8], ["y"])
    value = floats(ROWS, 8)
    exact = run(proto, value)
    own = ModelProto.FromString(proto.SerializeToString())
    normalize(own)
    np.testing.assert_allclose(run(own, value), exact, atol=1e-5)
    for node in own.graph.node:
        if node.op_type == "Gemm" and len(node.input) == 3:
            assert constants(own.graph, node.input)[node.input[2]].shape == (4,)
    assert sqnr_db(run(proto, value), run(as_int8(proto, value, tmp_path), value)) > 30


def test_a_bias_that_others_read_stays_what_it_is() -> None:
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["h"], "g"), helper.make_node("Add", ["h", "b"], ["y"], "a")]
    proto = graph_of(nodes, {"w": floats(8, 4), "b": floats(1, 4)}, ["n", 8], ["y"])
    own = ModelProto.FromString(proto.SerializeToString())
    normalize(own)
    value = floats(5, 8)
    np.testing.assert_allclose(run(own, value), run(proto, value), atol=1e-6)
    assert np.array_equal(constants(own.graph, ["b"])["b"], constants(proto.graph, ["b"])["b"])


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_nodes_without_names(method: str, tmp_path: Path) -> None:
    """A product with a vector comes first, which is none of those that become integers."""
    nodes = [
        helper.make_node("Mul", ["x", "s"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["m"]),
        helper.make_node("Relu", ["m"], ["r"], "MatMul_1"),
        helper.make_node("MatMul", ["r", "v"], ["y"]),
    ]
    proto = graph_of(nodes, {"s": floats(8), "w": floats(8, 4), "v": floats(4, 3)}, ["n", 8], ["y"])
    value = floats(ROWS, 8)
    found = as_int8(proto, value, tmp_path, method=method)
    assert sqnr_db(run(proto, value), run(found, value)) > 30
    normalize(proto)
    names = [node.name for node in proto.graph.node]
    assert names == ["Mul_1", "MatMul_1", "MatMul_1_1", "MatMul_2"]
