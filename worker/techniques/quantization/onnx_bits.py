"""A float ONNX file whose weights lie on grids to one that stores them in few bits: ONNX Runtime's MatMulNBits.

The operator multiplies floats with weights of 2, 4 or 8 bits, with a step and a zero point for each block of inputs.
Weights of 3 bits are stored in 4. Convolutions have no such operator and stay as they are.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from app.contract.errors import ExportFailed
from worker.techniques.quantization.stored import FEW_BITS, TRANSPOSED, packed_bits, stored_weights, weight_inputs
from worker.techniques.quantization.weight_grid import WeightGrid

DOMAIN = "com.microsoft"
STORED_BITS = {2: 2, 3: 4, 4: 4, 8: 8}
BLOCKS = (256, 128, 64, 32, 16)  # that the operator knows
# Activations are rounded to 8 bits on their way in, block by block: several times faster than floats, and of 8 bits
# the operator has no fast way with floats at all.
ACCURACY_LEVEL = 4
# Half of the last bit of bfloat16, the coarsest dtype that weights are stored in, relative to the weight.
TOLERANCE = 2.0**-8


@dataclass(frozen=True)
class _Codes:
    """A weight as it will be stored: `tensors` are its codes [outputs, blocks, bytes], steps [outputs, blocks] and zero
    points [outputs, bytes]."""

    tensors: list[TensorProto]
    outputs: int
    columns: int
    bits: int
    block: int


def store_bits(source: Path, target: Path, grids: Mapping[str, WeightGrid]) -> None:
    """Writes `source` to `target` with every product by a weight in `grids` as one with its codes.

    A weight that anything else uses too stays as it is. Raises ExportFailed where what is stored is not the weight.
    """
    proto = onnx.load(source)
    weights = {one.name: numpy_helper.to_array(one) for one in proto.graph.initializer if one.name in grids}
    products = list(_products(proto.graph, weights))
    stored = {name: _codes(name, weights[name], grids[name], _outputs_first(node)) for node, name in products}
    names = {node.output[0]: name for node, name in products}
    nodes = [
        new
        for node in proto.graph.node
        for new in (_replaced(node, stored[names[node.output[0]]]) if node.output[0] in names else [node])
    ]
    tensors = [one for one in proto.graph.initializer if one.name not in stored]
    tensors += [one for codes in stored.values() for one in codes.tensors]
    for field, parts in ((proto.graph.node, nodes), (proto.graph.initializer, tensors)):
        copies = [type(part).FromString(part.SerializeToString()) for part in parts]  # the parts go with the field
        del field[:]
        field.extend(copies)
    if stored and all(entry.domain != DOMAIN for entry in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    _check(proto, {name: weights[name] for name in stored})
    onnx.save_model(proto, str(target))


def _products(graph: GraphProto, weights: Container[str]) -> Iterator[tuple[NodeProto, str]]:
    """Each node that is the product of its input with a weight, with the weight's name."""
    uses: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in {*node.input, *_within(node)}:
            uses.setdefault(name, []).append(node)
    found: dict[str, list[NodeProto]] = {}
    for node, name in weight_inputs(graph):
        if name in weights and _plain(node):
            found.setdefault(name, []).append(node)
    for name, nodes in found.items():
        # It is stored once, so all that use it have to be products, and have it the same way round.
        if len(nodes) == len(uses[name]) and len({_outputs_first(node) for node in nodes}) == 1:
            yield from ((node, name) for node in nodes)


def _within(node: NodeProto) -> set[str]:
    """What the branches of a node read."""
    graphs = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return {name for graph in graphs for inner in graph.node for name in {*inner.input, *_within(inner)}}


def _plain(node: NodeProto) -> bool:
    """Whether the node is x W, and a bias at most."""
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "Gemm":
        return not values.get("transA") and values.get("alpha", 1.0) == 1.0 and values.get("beta", 1.0) == 1.0
    return node.op_type == "MatMul"


def _outputs_first(node: NodeProto) -> bool:
    return any(attribute.name == "transB" and attribute.i for attribute in node.attribute)


def _codes(name: str, weight: np.ndarray, grid: WeightGrid, outputs_first: bool) -> _Codes:
    rows = weight if outputs_first else weight.T
    outputs, columns = rows.shape
    bits, block = STORED_BITS[grid.bits], _block(grid, columns)
    blocks = -(-columns // block)
    codes, zeros = (tensor.numpy() for tensor in grid.unsigned(torch.from_numpy(rows.copy())))
    steps, zeros = (np.repeat(values, blocks // zeros.shape[1], 1) for values in (grid.step.numpy(), zeros))
    padding = np.repeat(zeros[:, -1:], blocks * block - columns, 1)
    blocked = np.concatenate([codes, padding], 1).reshape(outputs, blocks, block)
    zeros = np.pad(zeros, ((0, 0), (0, -blocks % (8 // bits))))
    stem = name if outputs_first else name + TRANSPOSED
    tensors = [
        numpy_helper.from_array(packed_bits(blocked, bits), f"{stem}_quantized"),
        numpy_helper.from_array(np.ascontiguousarray(steps, np.float32), f"{stem}_scale"),
        numpy_helper.from_array(packed_bits(zeros, bits), f"{stem}_zero_point"),
    ]
    return _Codes(tensors, outputs, columns, bits, block)


def _block(grid: WeightGrid, columns: int) -> int:
    """The block that groups are made of and that takes the fewest bytes; any, where an output has one grid."""
    single = grid.step.shape[1] == 1
    bits = STORED_BITS[grid.bits]

    def size(block: int) -> int:
        return -(-columns // block) * (block * bits + 32 + bits)

    return min((block for block in BLOCKS if single or grid.group % block == 0), key=size)


def _replaced(node: NodeProto, codes: _Codes) -> list[NodeProto]:
    """The product with codes, and what adds the bias of a Gemm."""
    bias = node.input[2] if len(node.input) > 2 else ""
    product = helper.make_node(
        FEW_BITS,
        [node.input[0], *(tensor.name for tensor in codes.tensors)],
        [f"{node.output[0]}_product" if bias else node.output[0]],
        node.name,
        domain=DOMAIN,
        N=codes.outputs,
        K=codes.columns,
        bits=codes.bits,
        block_size=codes.block,
        accuracy_level=ACCURACY_LEVEL,
    )
    if not bias:
        return [product]
    return [product, helper.make_node("Add", [product.output[0], bias], node.output, f"{node.name}_bias")]


def _check(proto: ModelProto, weights: Mapping[str, np.ndarray]) -> None:
    """Raises ExportFailed unless each weight comes out of its stored codes again."""
    stored = {weight.name: weight for weight in stored_weights(proto) if weight.few_bits is not None}
    for name, weight in weights.items():
        found = stored[name].dequantized()
        if found.shape != weight.shape or not (np.abs(found - weight) <= TOLERANCE * np.abs(weight)).all():
            raise ExportFailed(f"{name} should be stored in {stored[name].bits} bits, and would come out as another.")
