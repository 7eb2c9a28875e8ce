"""Names of an exported graph: weights as in the torch state dict, open dimensions as words.

The exporter keeps a weight's name where it uses the weight as it is. Where it folds a transposition or reorders the
gates of a recurrent layer the result is called `val_17`; such a weight is found again by its values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from onnx import GraphProto, ModelProto, numpy_helper
from torch import Tensor

from app.contract.facts import ModelFacts

# torch stacks the gates of an LSTM as i f g o, ONNX as i o f g; a GRU's r z n is ONNX's z r n.
GATE_ORDERS = ((0, 3, 1, 2), (1, 0, 2))


def rename_weights(proto: ModelProto, state: Mapping[str, Tensor]) -> None:
    """Gives initializers of at least two dimensions the names of the state dict's tensors they were made of, in place.

    A transposed or reordered weight gets the name of the original, or, where the original is there too, another that it
    has in the state dict; a bidirectional layer's stack of two that of the first direction. An initializer that matches
    nothing keeps its name.
    """
    origins: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        for form in _forms(tensor):
            origins.setdefault(_key(form), []).append(name)
    taken = {tensor.name for tensor in proto.graph.initializer}
    renamed: dict[str, str] = {}
    for tensor in proto.graph.initializer:
        if tensor.name in state or len(tensor.dims) < 2:
            continue
        values = numpy_helper.to_array(tensor)
        names = origins.get(_key(values)) or (origins.get(_key(values[0]), []) if values.ndim == 3 else [])
        if free := [name for name in names if name not in taken]:
            taken.add(free[-1])
            renamed[tensor.name] = free[-1]
            tensor.name = free[-1]
    _rename_uses(proto.graph, renamed)


def rename_dimensions(proto: ModelProto, facts: ModelFacts) -> None:
    """Calls the open dimensions of inputs and outputs `batch`, and `<input>_<axis>` where the facts leave more open."""
    words: dict[str, str] = {}
    for value, tensor in zip(proto.graph.input, facts.inputs, strict=True):
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim):
            if dimension.dim_param:
                words.setdefault(dimension.dim_param, "batch" if axis == 0 else f"{tensor.name}_{axis}")
    for value in (*proto.graph.input, *proto.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in words:
                dimension.dim_param = words[dimension.dim_param]


def _rename_uses(graph: GraphProto, renamed: Mapping[str, str]) -> None:
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in renamed:
                node.input[i] = renamed[name]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename_uses(inner, renamed)


def _forms(tensor: Tensor) -> Iterator[np.ndarray]:
    """What the exporter may make of a weight: the same, its transpose, its gates in another order."""
    if tensor.ndim < 2 or not tensor.is_floating_point() or tensor.dtype == torch.bfloat16:
        return
    array = tensor.detach().cpu().numpy()
    yield array
    if array.ndim != 2:
        return
    yield array.T
    for order in GATE_ORDERS:
        if array.shape[0] % len(order) == 0:
            gates = np.split(array, len(order))
            yield np.concatenate([gates[i] for i in order])


def _key(array: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
