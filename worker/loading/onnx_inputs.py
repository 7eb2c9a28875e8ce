"""What an ONNX graph takes: names, shapes and types of its inputs, where its batch is, which ids its tables know."""

from __future__ import annotations

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

from app.contract.errors import ModelRejected
from app.contract.facts import TensorFacts
from worker.loading.onnx_constants import held_tensors
from worker.loading.onnx_graph import FLOATS, model_inputs

# The types that inputs may have, and what they are fed from. Floats are float32 here, whatever the file computes in.
TYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float32",
    TensorProto.DOUBLE: "float32",
    TensorProto.INT8: "int8",
    TensorProto.INT16: "int16",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.UINT8: "uint8",
    TensorProto.BOOL: "bool",
}
_HOW = "Export it with an open batch: dynamic_shapes or dynamic_axes in torch.onnx.export, None in Keras."


def input_facts(proto: ModelProto) -> tuple[tuple[TensorFacts, ...], bool]:
    """The inputs, and whether their batch is fixed at 1. Raises ModelRejected where the first dimension is no batch."""
    values = model_inputs(proto.graph)
    if not values:
        raise ModelRejected("The model has no inputs: its output would be the same for every sample.")
    single = False
    found = []
    for value in values:
        batch, *shape = _sizes(value)
        if batch not in (None, 1):
            raise ModelRejected(
                f"Input {value.name[:200]!r} has a first dimension of {batch}, where the samples of a batch should be. "
                f"{_HOW} States that a model hands on from step to step are not fed from datasets."
            )
        single = single or batch == 1
        kind = value.type.tensor_type.elem_type
        if kind not in TYPES:
            raise ModelRejected(f"Input {value.name[:200]!r} is of a type that datasets do not have; float32 is best.")
        found.append(TensorFacts(name=value.name, shape=tuple(shape), dtype=TYPES[kind]))
    return tuple(found), single


def check_output(proto: ModelProto) -> None:
    """Raises ModelRejected unless the first output holds floating-point numbers."""
    first = proto.graph.output[0]
    if first.type.tensor_type.elem_type not in FLOATS:
        others = [value.name[:100] for value in proto.graph.output[1:]]
        raise ModelRejected(
            f"The model's first output {first.name[:100]!r} holds no floating-point numbers (class numbers, most "
            "likely): logits or probabilities have to come first."
            + (f" Put one of {', '.join(map(repr, others[:4]))} before it." if others else "")
        )


def vocabularies(proto: ModelProto) -> dict[str, int]:
    """How many ids are known to the table that an input is looked up in, by the input's name."""
    tables = dict(held_tensors(proto.graph))
    makers = {name: node for node in proto.graph.node for name in node.output}
    inputs = {value.name for value in model_inputs(proto.graph)}
    found: dict[str, int] = {}
    for node in proto.graph.node:
        if node.op_type != "Gather" or _axis(node) != 0:
            continue
        table = tables.get(_seen_through(node.input[0], makers, ("Identity",)))
        source = _seen_through(node.input[1], makers, ("Identity", "Cast"))
        if table is not None and source in inputs and table.dims:
            found[source] = min(table.dims[0], found.get(source, table.dims[0]))
    return found


def _sizes(value: ValueInfoProto) -> list[int | None]:
    """The declared sizes; None where one is open."""
    kind = value.type.tensor_type
    if not kind.HasField("shape") or not kind.shape.dim:
        raise ModelRejected(
            f"Input {value.name[:200]!r} has no batch dimension: a model takes samples, [batch, …] each. Export the "
            "model with what is the same for all samples (a rate, a flag) fixed inside it."
        )
    return [size.dim_value if size.dim_value > 0 else None for size in kind.shape.dim]


def _seen_through(name: str, makers: dict[str, NodeProto], kinds: tuple[str, ...]) -> str:
    while (node := makers.get(name)) is not None and node.op_type in kinds:
        name = node.input[0]
    return name


def _axis(node: NodeProto) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "axis"), 0)
