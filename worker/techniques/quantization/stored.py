"""What an ONNX file really stores: which weights are integers, with which scales, and if floats were left."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from app.contract.errors import ExportFailed
from worker.loading.onnx_narrow import FACTOR

# Which input of an operator is its weight.
WEIGHT_INPUT = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "Gather": 0}
# Of ONNX Runtime: a product with a weight of 2, 4 or 8 bits, in blocks of its inputs; a lookup in such a one.
FEW_BITS, LOOKUP = "MatMulNBits", "GatherBlockQuantized"
SCALE, REST = "_scale", "_rest"  # what names end in: of steps, and of what zero points lack for being whole numbers
QUANTIZED_INPUT = {"MatMulInteger": 1, "ConvInteger": 1}
# What ONNX Runtime's quantizer appends to a weight's name.
TRANSPOSED = "_Transposed"
SUFFIXES = ("_quantized", TRANSPOSED)
NARROW = ("bfloat16", "float8_e4m3fn")
MIN_WEIGHT_DIMENSIONS = 2  # a vector is a bias or a norm's gain
RECURRENT_BIAS = 3  # the input of LSTM and GRU that stacks their biases, one row a direction


@dataclass(frozen=True)
class StoredWeight:
    """A weight as the file holds it. `scale` and `zero_point` broadcast against `values`; None for floats.

    `transposed` says that the quantizer turned it round (it makes a MatMul of a Gemm). Weights of few bits come in
    blocks, `values` [outputs, blocks, block], of which the first `columns` of each output are no padding.
    """

    name: str
    values: np.ndarray
    transposed: bool = False
    scale: np.ndarray | None = None
    zero_point: np.ndarray | None = None
    columns: int | None = None
    few_bits: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape if self.columns is None else (len(self.values), self.columns)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        return self.few_bits or 8 * self.values.dtype.itemsize

    def dequantized(self) -> np.ndarray:
        """The float32 weight that the stored integers stand for, the way round that it had before quantization."""
        values = self.values
        if self.scale is not None and self.zero_point is not None:
            values = (values.astype(np.float32) - self.zero_point.astype(np.float32)) * self.scale
        values = self._unpadded(values)
        return values.T if self.transposed else values

    def zeros(self) -> int:
        """How many stored weights stand for an exact zero."""
        zero = 0 if self.zero_point is None else self.zero_point
        return int(np.count_nonzero(self._unpadded(self.values == zero)))

    def _unpadded(self, values: np.ndarray) -> np.ndarray:
        return values if self.columns is None else values.reshape(len(values), -1)[:, : self.columns]


def weight_inputs(graph: GraphProto) -> Iterator[tuple[NodeProto, str]]:
    """Each node of a float graph whose weight is a constant, with that weight's name."""
    constant = {
        tensor.name
        for tensor in graph.initializer
        if len(tensor.dims) >= MIN_WEIGHT_DIMENSIONS and tensor.data_type == TensorProto.FLOAT
    }
    for node in graph.node:
        position = WEIGHT_INPUT.get(node.op_type)
        if position is not None and node.input[position] in constant:
            yield node, node.input[position]


def base_name(name: str) -> str:
    """The weight's name before the quantizer appended to it."""
    while True:
        shorter = next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)
        if shorter == name:
            return name
        name = shorter


def stored_weights(proto: ModelProto) -> list[StoredWeight]:
    """Every weight of at least two dimensions, in the file's order; integers with the scales they are read with."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    scales = _scales(proto.graph, arrays)
    helpers = {name for pair in scales.values() for name in pair[:2]}
    helpers |= recurrent_biases(proto.graph)
    of_few_bits = dict(_few_bits_nodes(proto.graph))
    helpers |= few_bits_helpers(proto.graph) | factors(proto.graph)
    found = []
    for name, values in arrays.items():
        if values.ndim < MIN_WEIGHT_DIMENSIONS or name in helpers:
            continue
        if name in of_few_bits:
            found.append(_of_few_bits(name, of_few_bits[name], arrays))
        elif name in scales:
            scale, zero_point, axis = scales[name]
            found.append(
                StoredWeight(
                    base_name(name),
                    values,
                    TRANSPOSED in name,
                    along(arrays[scale], values, axis),
                    along(arrays.get(zero_point, np.zeros((), values.dtype)), values, axis),
                )
            )
        elif is_float(values):
            found.append(StoredWeight(base_name(name), values, TRANSPOSED in name))
    return found


def is_float(values: np.ndarray) -> bool:
    """Whether an array is of floats, of which numpy itself does not know the narrow ones."""
    return np.issubdtype(values.dtype, np.floating) or values.dtype.name in NARROW


def factors(graph: GraphProto) -> set[str]:
    """The names of the scales that narrow floats are multiplied by behind their Cast."""
    casts = _casts(graph)
    products = [node for node in graph.node if node.op_type == "Mul" and node.input[0] in casts]
    return {node.input[1] for node in products if node.input[1].startswith(casts[node.input[0]] + FACTOR)}


def _casts(graph: GraphProto) -> dict[str, str]:
    """What each Cast reads, by what it gives."""
    return {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}


def recurrent_biases(graph: GraphProto) -> set[str]:
    """The names of the biases of LSTM and GRU nodes, which have two dimensions and are no weights all the same."""
    casts = _casts(graph)
    return {
        casts.get(node.input[RECURRENT_BIAS], node.input[RECURRENT_BIAS])
        for node in graph.node
        if node.op_type in ("LSTM", "GRU") and len(node.input) > RECURRENT_BIAS
    }


def few_bits_helpers(graph: GraphProto) -> set[str]:
    """The names of the scales and zero points of weights of few bits, and of what these lack."""
    names = {name for _, node in _few_bits_nodes(graph) for name in node.input[2:4]}
    return names | {rest_name(name) for name in names}


def _few_bits_nodes(graph: GraphProto) -> Iterator[tuple[str, NodeProto]]:
    """Each weight of few bits with a node that reads it; codes that are looked up too are reshaped for products."""
    reshaped = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Reshape"}
    for node in graph.node:
        if node.op_type in (FEW_BITS, LOOKUP):
            data = node.input[1 if node.op_type == FEW_BITS else 0]
            yield reshaped.get(data, data), node


def rest_name(scale: str) -> str:
    """The name [groups, outputs] of what is to be added to each weight beside those that the scale makes floats of."""
    return scale.removesuffix(SCALE) + REST


def unpacked(values: np.ndarray, bits: int) -> np.ndarray:
    """The whole numbers [..., 8 / bits * n] of bytes [..., n], from the lowest bits on."""
    parts = [values >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(*values.shape[:-1], -1)


def packed_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bytes [..., n] of codes [..., 8 / bits * n] (uint8), the first in the lowest bits."""
    parts = codes.reshape(*codes.shape[:-1], -1, 8 // bits)
    return np.bitwise_or.reduce([parts[..., i] << (bits * i) for i in range(8 // bits)])


def _of_few_bits(name: str, node: NodeProto, arrays: dict[str, np.ndarray]) -> StoredWeight:
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    bits, block = numbers["bits"], numbers["block_size"]
    scale = arrays[node.input[2]][..., None]
    outputs, blocks, _ = scale.shape
    zero_point = unpacked(arrays[node.input[3]], bits)[:, :blocks, None]
    values = unpacked(arrays[name], bits).reshape(outputs, blocks, block)
    if (rest := arrays.get(rest_name(node.input[2]))) is not None:
        zero_point = zero_point - rest.T.repeat(blocks // len(rest), 1)[..., None] / scale
    columns = numbers.get("K", blocks * block)  # a lookup has no padding
    return StoredWeight(base_name(name), values, TRANSPOSED in name, scale, zero_point, columns, bits)


def check_stored(source: ModelProto, quantized: ModelProto, ops: Collection[str], kept: Collection[str]) -> None:
    """Raises ExportFailed unless each weight of `ops` in `source` is in `quantized` as an integer, and only so.

    `kept` names the nodes that were to stay floating point; a weight that such a node shares may be there both ways.
    """
    pairs = list(weight_inputs(source.graph))
    promised = {weight for node, weight in pairs if node.op_type in ops and node.name not in kept}
    spared = {weight for node, weight in pairs if node.name in kept}
    stored = stored_weights(quantized)
    integers = {weight.name for weight in stored if weight.scale is not None}
    if not integers and not promised:
        raise ExportFailed("ONNX Runtime's quantizer found no weight of the graph that it could store as int8.")
    floats = {weight.name for weight in stored if weight.scale is None}
    if missing := sorted(promised - integers):
        raise ExportFailed(f"{', '.join(missing[:5])} should be stored as int8 and is not.")
    if doubled := sorted((promised - spared) & floats):
        raise ExportFailed(f"{', '.join(doubled[:5])} would be stored twice, as int8 and as floating point.")


def _scales(graph: GraphProto, arrays: dict[str, np.ndarray]) -> dict[str, tuple[str, str, int]]:
    """Of each integer weight: the names of scale and zero point, and the axis of the scales."""
    found = {}
    # Of an embedding the dynamic quantizer dequantizes the rows that were looked up.
    rows = {n.input[0]: (n.input[1], n.input[2]) for n in graph.node if n.op_type == "DequantizeLinear" and n.input[2:]}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in arrays:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            zero_point = node.input[2] if len(node.input) > 2 else ""
            found[node.input[0]] = (node.input[1], zero_point, axis)
        elif node.op_type in QUANTIZED_INPUT and node.input[QUANTIZED_INPUT[node.op_type]] in arrays:
            weight = node.input[QUANTIZED_INPUT[node.op_type]]
            # The quantizer multiplies the integer product with a scale that it names after the weight.
            found[weight] = (scale_name(weight), node.input[3], -1)
        elif node.op_type == "Gather" and node.input[0] in arrays and node.output[0] in rows:
            found[node.input[0]] = (*rows[node.output[0]], 1)
    return found


def scale_name(weight: str) -> str:
    """The name that ONNX Runtime's dynamic quantizer gives to the scale of a weight."""
    return weight.removesuffix("_quantized") + "_scale"


def along(values: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
    """One value an index of `axis`, shaped to broadcast against the weight; a scalar stays one."""
    if values.size == 1:
        return values.reshape(())
    shape = [1] * weight.ndim
    shape[axis] = values.size
    return values.reshape(shape)
