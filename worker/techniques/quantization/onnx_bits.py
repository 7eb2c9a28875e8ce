"""A float ONNX file whose weights lie on grids to one that stores them in few bits, in operators of ONNX Runtime.

MatMulNBits multiplies floats with weights of 2, 4 or 8 bits, with a step and a zero point for each block of inputs;
GatherBlockQuantized looks up rows of such weights. A head that is the embedding's own weight shares its codes. Weights
of 3 bits are stored in 4. Convolutions have no such operator and stay as they are.

The operator has floating zero points too, and is then up to 30 times as slow (ONNX Runtime 1.32, one row, 4 bits; of 8
bits it refuses them). So whole ones are stored, and what they lack is a product of its own: it is the same for all
inputs of a group, and so of their sums.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from app.contract.errors import ExportFailed
from worker.loading.onnx_constants import replace_parts
from worker.techniques.quantization.graph import attributes
from worker.techniques.quantization.stored import (
    FEW_BITS,
    LOOKUP,
    REST,
    SCALE,
    TRANSPOSED,
    packed_bits,
    stored_weights,
)
from worker.techniques.quantization.weight_grid import WeightGrid

DOMAIN = "com.microsoft"
STORED_BITS = {2: 2, 3: 4, 4: 4, 8: 8}
BLOCKS = (256, 128, 64, 32, 16)  # that the operator knows
# Activations are rounded to 8 bits on their way in, block by block: faster than the operator is with floats, and of 8
# bits it has no fast way with floats at all.
ACCURACY_LEVEL = 4
# Half of the last bit of bfloat16, the coarsest dtype that weights are stored in, relative to the weight.
TOLERANCE = 2.0**-8
ON_GRID = 1e-4  # of the largest weight: as near to a multiple of what it was, it is one
ROUNDING = 2.0**-20  # of the largest weight: what float32 makes of a code and a rest near zero
SLICED = (("few_bits_first", 0), ("few_bits_last", -1))  # all dimensions but the last, which is also summed over
REST_OPSET = 13  # the first in which what a rest takes is written as here


@dataclass(frozen=True)
class _Uses:
    """The nodes that use a weight, all of them convertible: products and lookups, and what turns the weight round for
    a product. `outputs_first` says how the weight lies."""

    outputs_first: bool
    products: list[NodeProto]
    lookups: list[NodeProto]
    turns: list[NodeProto]


@dataclass(frozen=True)
class _Codes:
    """A weight as it will be stored: `tensors` are its codes [outputs, blocks, bytes] or, for lookups, [outputs,
    bytes], steps [outputs, blocks] and zero points [outputs, bytes]; `rest` [groups, outputs] is what these lack."""

    tensors: list[TensorProto]
    rest: TensorProto | None
    outputs: int
    columns: int
    bits: int
    block: int


def store_bits(
    source: Path, target: Path, grids: Mapping[str, WeightGrid], exact: Mapping[str, np.ndarray] | None = None
) -> None:
    """Writes `source` to `target` with every product by a weight in `grids`, and every lookup in it, as one of codes.

    `exact` has the weights as they lie on the grids: an exporter that folds a batch norm into a layer multiplies each
    output's, and so its steps. A weight that anything else uses too stays as it is. Raises ExportFailed where what is
    stored is not the weight.
    """
    proto = onnx.load(source)
    grids = {name: grid for name, grid in grids.items() if grid.rest() is None or _opset(proto) >= REST_OPSET}
    floats = (one for one in proto.graph.initializer if one.data_type == TensorProto.FLOAT)
    weights = {one.name: numpy_helper.to_array(one) for one in floats if one.name in grids}
    grids = {name: _rescaled(grids[name], weights[name], (exact or {}).get(name)) for name in weights}
    uses = {name: found for name in weights if (found := _uses(proto.graph, name, weights[name], grids[name]))}
    stored = {name: _codes(name, weights[name], grids[name], own) for name, own in uses.items()}
    new: dict[str, list[NodeProto]] = {}
    first: list[NodeProto] = []
    shapes: list[TensorProto] = []
    for name, own in uses.items():
        codes = stored[name]
        new |= {node.output[0]: [] for node in own.turns}
        new |= {node.output[0]: [_lookup(node, codes)] for node in own.lookups}
        if own.lookups and own.products:  # which want the same bytes in another shape
            first.append(_reshaped(codes))
            shapes.append(_shape(codes))
        new |= {node.output[0]: _product(node, codes, bool(own.lookups)) for node in own.products}
    nodes = [*first, *(one for node in proto.graph.node for one in new.get(node.output[0], [node]))]
    tensors = [one for one in proto.graph.initializer if one.name not in stored]
    tensors += [*(one for codes in stored.values() for one in codes.tensors), *shapes]
    tensors += _rests(codes.rest for codes in stored.values())
    replace_parts(proto.graph.node, nodes)
    replace_parts(proto.graph.initializer, tensors)
    if stored and all(entry.domain != DOMAIN for entry in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    _check(
        proto, {name: weights[name] for name in stored}, {name for name, own in stored.items() if own.rest is not None}
    )
    onnx.save_model(proto, str(target))


def _rescaled(grid: WeightGrid, weight: np.ndarray, exact: np.ndarray | None) -> WeightGrid:
    """The grid of a weight whose outputs were each multiplied by a factor, of either sign, since it was `exact`."""
    if exact is None or exact.size != weight.size or weight.ndim != 2 or np.array_equal(exact, weight):
        return grid
    outputs = len(grid.step)
    for rows in (weight, weight.T):
        for own in (exact, exact.T):
            if rows.shape != own.shape or len(rows) != outputs:
                continue
            power = np.square(own).sum(1)
            factors = np.divide((rows * own).sum(1), power, out=np.ones(outputs, rows.dtype), where=power > 0)
            if np.abs(rows - factors[:, None] * own).max(initial=0.0) <= ON_GRID * np.abs(rows).max(initial=0.0):
                nothing = torch.from_numpy(factors == 0)[:, None]
                steps = torch.where(nothing, 1.0, grid.step * torch.from_numpy(factors)[:, None])
                return replace(grid, step=steps, zero=torch.where(nothing, 0.0, grid.zero))
    return grid


def _opset(proto: ModelProto) -> int:
    return max(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def _uses(graph: GraphProto, name: str, weight: np.ndarray, grid: WeightGrid) -> _Uses | None:
    """How a weight is used; None where it cannot be stored in codes for all that read it."""
    products, lookups, turns = [], [], []
    ways: set[bool] = set()
    for node in _readers(graph, name):
        if node.op_type == "Gather" and list(node.input).index(name) == 0 and not attributes(node).get("axis"):
            lookups.append(node)
            ways.add(True)
        elif _is_product(node, name):
            products.append(node)
            ways.add(bool(attributes(node).get("transB")))
        elif node.op_type == "Transpose" and attributes(node).get("perm", [1, 0]) == [1, 0]:
            behind = _readers(graph, node.output[0])
            if not behind or not all(_is_product(one, node.output[0]) for one in behind):
                return None
            turns.append(node)
            products += behind
            ways |= {not attributes(one).get("transB") for one in behind}
        else:
            return None
    given = {value.name for value in graph.output} & {name, *(node.output[0] for node in turns)}
    if len(ways) != 1 or weight.ndim != 2 or given:
        return None
    if lookups and (weight.shape[1] % _block(grid, weight.shape[1]) or grid.rest() is not None):
        return None
    return _Uses(ways.pop(), products, lookups, turns)


def _readers(graph: GraphProto, name: str) -> list[NodeProto]:
    return [node for node in graph.node if name in node.input or name in _within(node)]


def _within(node: NodeProto) -> set[str]:
    """What the branches of a node read."""
    graphs = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return {name for graph in graphs for inner in graph.node for name in {*inner.input, *_within(inner)}}


def _is_product(node: NodeProto, weight: str) -> bool:
    """Whether the node is x W, and a bias at most."""
    if weight in node.input[:1] or weight not in node.input[:2]:
        return False
    values = attributes(node)
    if node.op_type == "Gemm":
        return not values.get("transA") and values.get("alpha", 1.0) == 1.0 and values.get("beta", 1.0) == 1.0
    return node.op_type == "MatMul"


def _codes(name: str, weight: np.ndarray, grid: WeightGrid, uses: _Uses) -> _Codes:
    rows = weight if uses.outputs_first else weight.T
    outputs, columns = rows.shape
    bits, block = STORED_BITS[grid.bits], _block(grid, columns)
    blocks = -(-columns // block)
    codes, zeros = (tensor.numpy() for tensor in grid.unsigned(torch.from_numpy(rows.copy())))
    rest = grid.rest()
    steps, zeros = (np.repeat(values, blocks // zeros.shape[1], 1) for values in (grid.step.numpy(), zeros))
    padding = np.repeat(zeros[:, -1:], blocks * block - columns, 1)
    blocked = packed_bits(np.concatenate([codes, padding], 1).reshape(outputs, blocks, block), bits)
    zeros = np.pad(zeros, ((0, 0), (0, -blocks % (8 // bits))))
    stem = name if uses.outputs_first else name + TRANSPOSED
    tensors = [
        numpy_helper.from_array(blocked.reshape(outputs, -1) if uses.lookups else blocked, f"{stem}_quantized"),
        numpy_helper.from_array(np.ascontiguousarray(steps, np.float32), stem + SCALE),
        numpy_helper.from_array(packed_bits(zeros, bits), f"{stem}_zero_point"),
    ]
    lacking = None if rest is None else numpy_helper.from_array(np.ascontiguousarray(rest.T.numpy()), stem + REST)
    return _Codes(tensors, lacking, outputs, columns, bits, block)


def _block(grid: WeightGrid, columns: int) -> int:
    """The block that groups are made of and that takes the fewest bytes; any, where an output has one grid."""
    single = grid.step.shape[1] == 1
    bits = STORED_BITS[grid.bits]

    def size(block: int) -> int:
        return -(-columns // block) * (block * bits + 32 + bits)

    return min((block for block in BLOCKS if single or grid.group % block == 0), key=size)


def _product(node: NodeProto, codes: _Codes, reshaped: bool) -> list[NodeProto]:
    """The product with codes, and what adds the rest of its zero points and the bias of a Gemm."""
    names = [tensor.name for tensor in codes.tensors]
    bias = node.input[2] if len(node.input) > 2 else ""
    added, nodes = [bias] if bias else [], []
    if codes.rest is not None:
        nodes = _sums_times(node, codes.rest)
        added.insert(0, nodes[-1].output[0])
    steps = [f"{node.output[0]}_before_sum_{place}" for place in range(len(added))] + [node.output[0]]
    product = helper.make_node(
        FEW_BITS,
        [node.input[0], _in_blocks(codes) if reshaped else names[0], *names[1:]],
        steps[:1],
        node.name,
        domain=DOMAIN,
        N=codes.outputs,
        K=codes.columns,
        bits=codes.bits,
        block_size=codes.block,
        accuracy_level=ACCURACY_LEVEL,
    )
    sums = [
        helper.make_node("Add", [before, term], [after], f"{after}_sum")
        for before, term, after in zip(steps, added, steps[1:], strict=False)
    ]
    return [*nodes, product, *sums]


def _sums_times(node: NodeProto, rest: TensorProto) -> list[NodeProto]:
    """The sums of the input's groups, times what is to be added to each weight of a group."""
    stem, (groups, _) = f"{node.output[0]}_groups", rest.dims
    names = [f"{stem}_{what}" for what in ("shape", "leading", "wanted", "apart", "sums", "rest")]
    shape, leading, wanted, apart, sums, product = names
    return [
        helper.make_node("Shape", [node.input[0]], [shape], shape),
        helper.make_node("Slice", [shape, *(name for name, _ in SLICED)], [leading], leading),
        helper.make_node("Concat", [leading, _groups_name(groups)], [wanted], wanted, axis=0),
        helper.make_node("Reshape", [node.input[0], wanted], [apart], apart),
        helper.make_node("ReduceSum", [apart, SLICED[1][0]], [sums], sums, keepdims=0),
        helper.make_node("MatMul", [sums, rest.name], [product], product),
    ]


def _rests(rests: Iterable[TensorProto | None]) -> list[TensorProto]:
    """What the nodes of `_sums_times` read beside their input."""
    found = [rest for rest in rests if rest is not None]
    if not found:
        return []
    counts = {rest.dims[0] for rest in found}
    shapes = [numpy_helper.from_array(np.array([groups, -1]), _groups_name(groups)) for groups in sorted(counts)]
    return [*found, *shapes, *(numpy_helper.from_array(np.array([value]), name) for name, value in SLICED)]


def _groups_name(groups: int) -> str:
    return f"few_bits_{groups}_groups"


def _lookup(node: NodeProto, codes: _Codes) -> NodeProto:
    data, *rest = (tensor.name for tensor in codes.tensors)
    return helper.make_node(
        LOOKUP,
        [data, node.input[1], *rest],
        node.output,
        node.name,
        domain=DOMAIN,
        bits=codes.bits,
        block_size=codes.block,
        gather_axis=0,
        quantize_axis=1,
    )


def _in_blocks(codes: _Codes) -> str:
    return f"{codes.tensors[0].name}_in_blocks"


def _reshaped(codes: _Codes) -> NodeProto:
    name = codes.tensors[0].name
    return helper.make_node("Reshape", [name, f"{name}_shape"], [_in_blocks(codes)], f"{name}_reshaped")


def _shape(codes: _Codes) -> TensorProto:
    shape = (codes.outputs, codes.columns // codes.block, codes.block * codes.bits // 8)
    return numpy_helper.from_array(np.array(shape), f"{codes.tensors[0].name}_shape")


def _check(proto: ModelProto, weights: Mapping[str, np.ndarray], with_rest: Collection[str]) -> None:
    """Raises ExportFailed unless each weight comes out of its stored codes again."""
    stored = {weight.name: weight for weight in stored_weights(proto) if weight.few_bits is not None}
    for name, weight in weights.items():
        found = stored[name].dequantized()
        allowed = TOLERANCE * np.abs(weight)
        if name in with_rest:
            allowed += ROUNDING * np.abs(weight).max()
        if found.shape != weight.shape or not (np.abs(found - weight) <= allowed).all():
            raise ExportFailed(f"{name} should be stored in {stored[name].bits} bits, and would come out as another.")
