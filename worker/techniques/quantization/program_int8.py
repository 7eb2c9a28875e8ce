"""An int8 ONNX graph as a torch module with the same integers, steps and ranges, to be exported as a program.

The graph was found by our own static quantization, which needs no torch module; here it is imported operator by
operator like an upload. Q and DQ become `torch.ops.quantized_decomposed`, in the places where torch's compiler makes
integer kernels of them. So a weight has the same codes in both artifacts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, numpy_helper
from torch import fx, nn

from app.contract.errors import ExportFailed
from worker.loading.onnx_graph import Imported, NotImportable, import_graph
from worker.loading.onnx_ops.integers import QUANTIZED_TABLE
from worker.loading.onnx_ops.origins import Origin, transposed
from worker.techniques.quantization.graph import uses
from worker.techniques.quantization.integer_layers import Codes, IntegerConstant, codes_of, with_integers
from worker.techniques.quantization.stored import StoredWeight, along, base_name, stored_weights

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Source:
    """Which weight of the graph lies at a place of the module, and whether as its transpose."""

    weight: str
    transposed: bool


@dataclass(frozen=True)
class IntegerModule:
    """A module, and by the names of its integers the weights of the graph that they are."""

    module: fx.GraphModule
    sources: Mapping[str, Source]


def integer_module(source: ModelProto, *, fixed_batch: bool = False) -> IntegerModule:
    """The int8 graph as a module of its inputs in their order, which gives its first output.

    Every weight that the graph holds as integers is there as the same integers, and not as floats. Raises ExportFailed,
    with the pointer /export, where an operator has no form in torch.
    """
    proto = ModelProto.FromString(source.SerializeToString())
    stored = {weight.name: weight for weight in stored_weights(proto) if weight.scale is not None}
    _weights_as_floats(proto.graph)
    output = _without_idle_roundings(proto.graph, stored.keys())
    try:
        imported = import_graph(proto, output, fixed_batch=fixed_batch, table=QUANTIZED_TABLE)
        sources = _store(imported, stored, _tables(proto.graph))
    except (NotImportable, ValueError) as reason:
        raise ExportFailed(
            f"The quantized graph has no form as a program of torch: {reason} Export onnx instead.", pointer="/export"
        ) from reason
    return IntegerModule(imported.module.eval(), sources)


def _weights_as_floats(graph: GraphProto) -> None:
    """Constants that are read through a DequantizeLinear become floats under their own names, in place.

    So layers are made of them as of an upload's; the integers are put back into the layers.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    renamed: dict[str, str] = {}
    for node in [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]:
        values, scale = (numpy_helper.to_array(constants[name]) for name in node.input[:2])
        zero_point = numpy_helper.to_array(constants[node.input[2]]) if node.input[2:] else np.zeros((), values.dtype)
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        scale, zero_point = (along(one, values, axis) for one in (scale, zero_point))
        floats = (values.astype(np.float32) - zero_point.astype(np.float32)) * scale
        name = base_name(node.input[0])
        graph.initializer.append(numpy_helper.from_array(floats.astype(np.float32), name))
        renamed[node.output[0]] = name
        graph.node.remove(node)
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)


def _without_idle_roundings(graph: GraphProto, integers: Iterable[str]) -> str:
    """Leaves out Q and DQ, in place, where they cost accuracy and save no time in torch; returns what gives the output.

    What was looked up in integers is rounded already. torch has no integer product of two activations. It adds to what
    a product gives before that is rounded. And the end may as well stay a float.
    """
    held = set(integers)
    makers = {name: node for node in graph.node for name in node.output}
    counts = uses(graph)
    for node in graph.node:
        for place, name in enumerate(node.input):
            exact = _before_rounding(makers, name)
            if exact is not None and _idle(node, makers.get(exact), held, counts[name]):
                node.input[place] = exact
                if node.op_type == "Add":
                    break  # the kernel takes one
    return _before_rounding(makers, graph.output[0].name) or graph.output[0].name


def _idle(reader: NodeProto, maker: NodeProto | None, held: set[str], readers: int) -> bool:
    if maker is not None and maker.op_type == "Gather" and maker.input[0] in held:
        return True
    if reader.op_type == "MatMul":
        return held.isdisjoint(reader.input)
    return reader.op_type == "Add" and maker is not None and maker.op_type in PRODUCTS and readers == 1


def _before_rounding(makers: Mapping[str, NodeProto], name: str) -> str | None:
    """The tensor that Q and DQ have made `name` of, if they have."""
    after = makers.get(name)
    before = makers.get(after.input[0]) if after is not None and after.op_type == "DequantizeLinear" else None
    return before.input[0] if before is not None and before.op_type == "QuantizeLinear" else None


def _tables(graph: GraphProto) -> set[str]:
    """What is looked up in and nothing else."""
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            readers.setdefault(name, set()).add(f"{node.op_type} {place}")
    return {name for name, found in readers.items() if found == {"Gather 0"}}


def _store(imported: Imported, stored: Mapping[str, StoredWeight], tables: Collection[str]) -> dict[str, Source]:
    """Puts the integers back, in place, and says where. Raises ValueError for a weight that has no place, but for a
    table of which the same rows are always taken, as of positions where the length is fixed: they are a constant."""
    found: dict[str, Source] = {}
    shared: dict[tuple[object, ...], Codes] = {}  # of layers that have one weight in common
    for path, origin, weight in _places(imported, stored):
        key = (weight.name, origin.select, origin.shape, origin.stride, origin.offset)
        codes = shared[key] = shared.get(key) or codes_of(weight, origin)
        owner, _, name = path.rpartition(".")
        layer = imported.module.get_submodule(owner) if name == "weight" else None
        if layer is not None and any(node.target == owner for node in imported.module.graph.nodes):
            imported.module.set_submodule(owner, with_integers(layer, codes))
        else:
            path = f"{_call_constant(imported.module, path, IntegerConstant(codes))}.weight"
        found[path] = Source(weight.name, origin.select is transposed)
    if missing := sorted(stored.keys() - {source.weight for source in found.values()} - set(tables)):
        raise ValueError(f"{', '.join(missing[:5])} has no place in it.")
    imported.module.recompile()
    return found


def _places(imported: Imported, stored: Mapping[str, StoredWeight]) -> Iterator[tuple[str, Origin, StoredWeight]]:
    """Each parameter that was made of integers, once."""
    origins = {origin.path: origin for origin in imported.origins}
    for path, origin in origins.items():
        if origin.source is not None and origin.source in stored:
            yield path, origin, stored[origin.source]


def _call_constant(module: fx.GraphModule, path: str, constant: nn.Module) -> str:
    """Makes what reads the attribute `path` call a module in its place; returns that module's name."""
    name = f"{path}_codes"
    module.add_submodule(name, constant)
    for node in [node for node in module.graph.nodes if node.op == "get_attr" and node.target == path]:
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.call_module(name))
        module.graph.erase_node(node)
    owner, _, last = path.rpartition(".")
    delattr(module.get_submodule(owner), last)
    return name
