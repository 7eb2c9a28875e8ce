"""ONNX graphs for tests: one operator, small networks, and the means to run them in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Array = NDArray[Any]
BATCH = "batch"


@dataclass(frozen=True)
class Const:
    """A tensor of the file, in place of an input; `node` holds it in a Constant node."""

    array: Array
    node: bool = False


def const(values: Any, dtype: str = "float32") -> Const:
    return Const(np.asarray(values, dtype))


def axes(*values: int) -> Const:
    return Const(np.asarray(values, np.int64))


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(
    nodes: Sequence[NodeProto],
    inputs: dict[str, Array | Sequence[int | str | None]],
    constants: dict[str, Array] | None = None,
    *,
    outputs: Sequence[str] = ("y",),
    opset: int = 20,
    domains: Sequence[str] = (),
) -> ModelProto:
    """A model; inputs are given as arrays, whose first dimension is open, or as shapes of float32."""
    values = []
    for name, given in inputs.items():
        if isinstance(given, np.ndarray):
            kind, shape = helper.np_dtype_to_tensor_dtype(given.dtype), [BATCH, *given.shape[1:]]
        else:
            kind, shape = TensorProto.FLOAT, list(given)
        values.append(helper.make_tensor_value_info(name, kind, shape))
    graph = helper.make_graph(
        list(nodes),
        "test",
        values,
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    made = helper.make_model(graph, opset_imports=imports, ir_version=8 if opset < 21 else 10)
    return typed(made)


def typed(proto: ModelProto) -> ModelProto:
    """With the types of its outputs, which the checker asks for."""
    return onnx.shape_inference.infer_shapes(proto)


def one_node(
    op: str, opset: int, given: Sequence[Array | Const | None], *, outputs: int = 1, domain: str = "", **attributes: Any
) -> ModelProto:
    """A model of one operator: arrays are inputs, a Const is a tensor of the file, None is left out."""
    names, inputs, constants, nodes = [], {}, {}, []
    for index, value in enumerate(given):
        name = "" if value is None else f"x{index}"
        names.append(name)
        if isinstance(value, Const) and value.node:
            nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value.array, name)))
        elif isinstance(value, Const):
            constants[name] = value.array
        elif value is not None:
            inputs[name] = value
    made = [f"y{index}" if index else "y" for index in range(outputs)]
    nodes.append(helper.make_node(op, names, made, domain=domain, name="the_node", **attributes))
    domains = [domain] if domain else []
    return model(nodes, inputs, constants, outputs=made, opset=opset, domains=domains)


def run(proto: ModelProto, feed: dict[str, Array], output: str | None = None) -> Array:
    """An output of the model in ONNX Runtime, the first one without a name."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = None if output is None else [output]
    result: Array = session.run(names, feed)[0]
    return result
