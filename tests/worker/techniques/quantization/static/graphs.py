"""Small graphs, and what they give."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper, numpy_helper

_random = [np.random.default_rng(0)]


def reseed() -> None:
    """Begins the numbers of `floats` again, so that no test hangs on those before it."""
    _random[0] = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    """Normal noise."""
    return _random[0].normal(size=shape).astype(np.float32)


def graph_of(nodes: list[Any], given: dict[str, np.ndarray], shape: list[int | str], outputs: list[str]) -> ModelProto:
    """A model of an input `x`, constants by name, and float outputs."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    own = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        values,
        [numpy_helper.from_array(value, name) for name, value in given.items()],
    )
    return helper.make_model(own, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(proto: ModelProto, value: np.ndarray) -> np.ndarray:
    """Its first output."""
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": value})[0]
    return found
