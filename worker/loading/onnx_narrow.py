"""Float weights of an ONNX graph in fewer bits: a tensor of a narrower type, with a Cast in front of what reads it.

The graph computes as before. Runtimes fold the Cast when they load a graph, so it costs bytes of the file alone. ONNX
Runtime never folds DequantizeLinear, which would say the same of float8 and cost time with every run.

Only what is exact is stored so. Where the exporter has folded a BatchNorm into a weight, its factors, one a channel,
are multiplied in behind the Cast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from worker.loading.onnx_constants import free_name, held_tensors, replace_parts, used_names
from worker.vetting.onnx import subgraphs

TYPES = {
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
}
# The first version of ONNX that casts from the type.
LEAST_OPSET = {TensorProto.FLOAT16: 9, TensorProto.BFLOAT16: 13, TensorProto.FLOAT8E4M3FN: 19}
FLOAT8_IR = 9  # the first version of files that know it
WIDE = (TensorProto.FLOAT, TensorProto.DOUBLE)
FACTOR = "_factor"  # behind a weight's name: what its values are multiplied by
# Two products of float32 may be this far apart, relative to either.
TOLERANCE = 2.0**-22


@dataclass(frozen=True)
class Narrow:
    """Values in a narrow type, and what makes the weight of them: a float32 factor that broadcasts against them, and a
    type in which the product is rounded."""

    values: np.ndarray
    factor: np.ndarray | None = None
    rounded: int | None = None


def store_narrow(proto: ModelProto, dtype: torch.dtype, state: Mapping[str, Tensor]) -> None:
    """Stores every float tensor of the main graph that `dtype` (float16, bfloat16) holds in it, in place, unless it is
    so small that the Cast would be longer. `state` are the weights, by the names that the graph has for them."""
    found = {}
    for name, values in _tensors(proto, dtype):
        narrow = exact(values, dtype)
        if narrow is None and name in state:
            narrow = _scaled(values, state[name], dtype)
        if narrow is not None:
            found[name] = narrow
    _insert(proto.graph, found)


def store_float8(
    proto: ModelProto, scales: Mapping[str, Tensor], state: Mapping[str, Tensor], rounded: Mapping[str, torch.dtype]
) -> None:
    """Stores the weights in `scales` as float8_e4m3, in place. A weight in `state` is a value of that type times its
    scale, which broadcasts against it, in float32, or, where that is named, the dtype in `rounded`."""
    found = {}
    for name, values in _tensors(proto, torch.float8_e4m3fn):
        if name in scales:
            own = _codes(values, state[name], scales[name], TYPES.get(rounded.get(name, torch.float32)))
            if own is not None:
                found[name] = own
    if found:
        proto.ir_version = max(proto.ir_version, FLOAT8_IR)
    _insert(proto.graph, found)


def exact(values: np.ndarray, dtype: torch.dtype) -> Narrow | None:
    """The values in a narrower type, where that has all of them."""
    with np.errstate(over="ignore"):
        narrow = values.astype(helper.tensor_dtype_to_np_dtype(TYPES[dtype]))
    return Narrow(narrow) if np.array_equal(narrow.astype(values.dtype), values) else None


def channel_factors(product: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray | None:
    """The factors, one an index of `axis` and shaped to broadcast, that make `product` of `weight` within rounding.

    None where there are none such. Both are float32 of one shape."""
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    others = np.moveaxis(product, axis, 0).reshape(rows.shape)
    largest = np.abs(rows).argmax(1)[:, None]
    below = np.take_along_axis(rows, largest, 1)
    factors = np.take_along_axis(others, largest, 1) / np.where(below == 0, 1, below)
    if not (np.abs(rows * factors - others) <= TOLERANCE * np.abs(others)).all():
        return None
    return factors.reshape([-1 if place == axis else 1 for place in range(weight.ndim)]).astype(np.float32)


def _scaled(values: np.ndarray, weight: Tensor, dtype: torch.dtype) -> Narrow | None:
    """A weight that is one of the module's but for a factor a channel."""
    own = weight.detach().numpy()
    if own.shape != values.shape or values.ndim < 2:
        return None
    narrow = exact(own, dtype)
    factors = (channel_factors(values, own, axis) for axis in (0, 1))
    factor = next((found for found in factors if found is not None), None)
    return None if narrow is None or factor is None else Narrow(narrow.values, factor)


def _codes(values: np.ndarray, weight: Tensor, scale: Tensor, rounded: int | None) -> Narrow | None:
    """The codes of a weight as the graph has it: as the module does, turned round, or with a BatchNorm in it."""
    own, scales = weight.detach().numpy(), scale.numpy()
    codes = (own / scales).astype(helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN))
    if np.array_equal(values, own):
        return Narrow(codes, scales, rounded)
    if np.array_equal(values, own.T):
        return Narrow(codes.T, scales.T, rounded)
    axis = int(np.argmax(scales.shape))
    factor = channel_factors(values, own, axis) if values.shape == own.shape and rounded is None else None
    return None if factor is None else Narrow(codes, scales * factor)


def _tensors(proto: ModelProto, dtype: torch.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """The float tensors of the main graph that could be stored in a type, by name."""
    opset = next((one.version for one in proto.opset_import if one.domain in ("", "ai.onnx")), 0)
    if opset < LEAST_OPSET[TYPES[dtype]]:
        return
    given = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    for name, tensor in held_tensors(proto.graph):
        if tensor.data_type in WIDE and name not in given:
            yield name, numpy_helper.to_array(tensor)


def _insert(graph: GraphProto, found: Mapping[str, Narrow]) -> None:
    """Puts the narrow values in the place of the tensors, with what widens them, where that saves bytes."""
    occupied = used_names(graph) | {name for node in graph.node for name in node.output}
    occupied |= {name for name, _ in held_tensors(graph)}
    widened: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for name, tensor in [(name, tensor) for name, tensor in held_tensors(graph) if name in found]:
        own, factors = _widening(name, tensor.data_type, found[name], occupied)
        parts = sum(node.ByteSize() for node in own) + sum(factor.ByteSize() for factor in factors)
        if found[name].values.nbytes + parts >= numpy_helper.to_array(tensor).nbytes:
            continue
        widened[name] = own[-1].output[0]
        nodes += own
        graph.initializer.extend(factors)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(found[name].values), tensor.name))
    _rewire(graph, widened)
    constants = [node for node in graph.node if widened.keys() & set(node.output)]
    others = [node for node in graph.node if not widened.keys() & set(node.output)]
    replace_parts(graph.node, [*constants, *nodes, *others])
    replace_parts(graph.value_info, [value for value in graph.value_info if value.name not in widened])


def _widening(name: str, kind: int, narrow: Narrow, occupied: set[str]) -> tuple[list[NodeProto], list[TensorProto]]:
    """The nodes that make a weight of its narrow values, the last of which gives it, and the factor that they take."""
    nodes: list[NodeProto] = []
    factors: list[TensorProto] = []

    def put(operator: str, inputs: list[str], **attributes: Any) -> str:
        given = free_name(f"{name}_float", occupied)
        nodes.append(helper.make_node(operator, inputs, [given], given, **attributes))
        return given

    wide = kind if narrow.factor is None else TensorProto.FLOAT  # in which the product is a weight of the module
    value = put("Cast", [name], to=wide)
    if narrow.factor is not None:
        factors.append(numpy_helper.from_array(narrow.factor, free_name(f"{name}{FACTOR}", occupied)))
        value = put("Mul", [value, factors[0].name])
    if narrow.rounded is not None:
        value = put("Cast", [value], to=narrow.rounded)
    if narrow.rounded is not None or wide != kind:
        put("Cast", [value], to=kind)
    return nodes, factors


def _rewire(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Gives all nodes, also in graphs within, other values to read, unless a graph has one of its own of that name."""
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = names.get(name, name)
        for inner in subgraphs(node):
            own = {name for name, _ in held_tensors(inner)} | {name for one in inner.node for name in one.output}
            own |= {value.name for value in inner.input}
            _rewire(inner, {name: other for name, other in names.items() if name not in own})
