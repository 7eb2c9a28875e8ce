"""An ONNX file, read and checked before anything runs it: onnx and ONNX Runtime are more trusting.

What comes out is one self-contained graph: weights inside, functions written out, operators of known domains alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, inliner

from app.contract.errors import TersorError
from worker.vetting.apart import apart
from worker.vetting.boundary import first_line
from worker.vetting.demand import MAX_SAMPLE_BYTES
from worker.vetting.onnx_tensors import External, check_tensor
from worker.vetting.protobuf import check_message

MIN_OPSET, MAX_OPSET = 9, 23
MAX_BYTES = (1 << 31) - (1 << 24)  # a protobuf message ends at 2 GiB, and the runtime gets one
MAX_NODES = 100_000  # once functions are written out
SMALL_TENSOR = 1024  # bytes; shapes and axes, which shape inference reads, are far smaller
FOLLOWING_BYTES = 512 << 20  # for following computed sizes; a graph of a few thousand nodes takes a few MB
MAX_CALLS = 32  # of functions in functions
MAX_SUBGRAPHS = 8  # an If in a Loop in an If…
# ONNX Runtime's own floating-point operators, which its optimizer writes. None of them opens a file.
CONTRIB = "com.microsoft"
CONTRIB_OPS = frozenset(
    {
        *("Attention", "BiasGelu", "BiasSplitGelu", "EmbedLayerNormalization", "FastGelu", "FusedConv", "FusedGemm"),
        *("FusedMatMul", "Gelu", "GroupQueryAttention", "MultiHeadAttention", "QuickGelu", "RotaryEmbedding"),
        *("SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
    }
)
_QUANTIZED = frozenset(
    {
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
        *("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"),
    }
)
_EXPORT = "torch.onnx.export(model, inputs, 'model.onnx', opset_version=20, dynamo=True, external_data=False)"


def read_onnx(content: bytes, external: External | None, error: type[TersorError]) -> ModelProto:
    """The model in `content`, with external tensors put into it. Raises `error` with a sentence.

    Checked: size, structure, opset 9 to 23, domains, depth of subgraphs, size of functions once they are written out,
    every tensor's bytes against its shape, and all that onnx's own checker checks, with shapes. `external` gives the
    data files of an archive; without it, external data is refused. Float ONNX only: quantized operators are refused.
    """
    if len(content) > MAX_BYTES:
        raise error(f"The ONNX file has {len(content)} bytes; at most {MAX_BYTES} are taken.")
    check_message(content, ModelProto.DESCRIPTOR, error)
    try:
        proto = ModelProto.FromString(content)
    except Exception as failure:  # protobuf's, which is no package of ours
        raise error("The file starts as ONNX and is damaged or was cut short. Export it again.") from failure
    if not proto.HasField("graph") or not proto.graph.node or not proto.graph.output:
        raise error("The ONNX file holds no graph with nodes and outputs. Export the model again.")
    proto.ClearField("training_info")  # graphs of another time, which nothing here runs
    _check_opset(proto, error)
    _check_tensors(proto, external, error)
    proto = _inlined(proto, error)
    _check_graph(proto.graph, 0, error)
    _check_values(proto, error)
    return _checked(proto, error)


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and all its subgraphs."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from graphs(inner)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs in a node's attributes: branches and bodies."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def skeleton(proto: ModelProto) -> ModelProto:
    """A copy, not to be run, whose large tensors have their shapes alone: enough to infer those of all values."""
    graph = proto.graph
    bare = ModelProto(
        ir_version=proto.ir_version,
        opset_import=proto.opset_import,
        graph=GraphProto(
            name=graph.name, node=graph.node, input=graph.input, output=graph.output, value_info=graph.value_info
        ),
    )
    for tensor in graph.initializer:
        if len(tensor.raw_data) > SMALL_TENSOR:
            bare.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        else:
            bare.graph.initializer.add().CopyFrom(tensor)
    return bare


def _check_opset(proto: ModelProto, error: type[TersorError]) -> None:
    for entry in proto.opset_import:
        if entry.domain == "ai.onnx":
            entry.domain = ""
    versions = [entry.version for entry in proto.opset_import if entry.domain == ""]
    if len(versions) != 1:
        raise error("The file has to name one version of the ONNX operators (opset_import); export it again.")
    if not MIN_OPSET <= versions[0] <= MAX_OPSET:
        raise error(
            f"The model uses opset {versions[0]}; opsets {MIN_OPSET} to {MAX_OPSET} are taken. Export it again with "
            f"{_EXPORT}, or use onnx.version_converter.convert_version(model, 20)."
        )


def _check_tensors(proto: ModelProto, external: External | None, error: type[TersorError]) -> None:
    total = sum(check_tensor(tensor, external, error) for tensor in _tensors(proto))
    if total > MAX_BYTES:
        raise error(f"The model's tensors take {total} bytes; at most {MAX_BYTES} are taken.")


def _tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Every tensor, wherever it lies. Sparse ones are refused where their holders are checked."""
    for graph in graphs(proto.graph):
        yield from graph.initializer
        yield from _node_tensors(graph.node)
    for function in proto.functions:
        yield from _node_tensors(function.node)
        for node in function.node:
            for inner in subgraphs(node):
                for graph in graphs(inner):
                    yield from graph.initializer
                    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _inlined(proto: ModelProto, error: type[TersorError]) -> ModelProto:
    """The model without functions: their bodies stand where they were called."""
    if not proto.functions:
        return proto
    _check_growth(proto, error)
    try:
        flat: ModelProto = inliner.inline_local_functions(proto)
    except Exception as failure:  # the library's C++ errors share no class
        raise error(f"The model's functions cannot be written out: {first_line(failure)}.") from failure
    if flat.functions:
        raise error("The model's functions cannot be written out: their operators are of other versions.")
    return flat


def _check_growth(proto: ModelProto, error: type[TersorError]) -> None:
    """How many nodes there will be, counted without writing them: functions that call functions grow exponentially."""
    functions = {(function.domain, function.name, function.overload): function for function in proto.functions}
    sizes: dict[tuple[str, str, str], int] = {}

    def size(key: tuple[str, str, str], callers: tuple[tuple[str, str, str], ...]) -> int:
        if key in callers or len(callers) > MAX_CALLS:
            raise error(f"The model's functions call themselves, or each other more than {MAX_CALLS} deep.")
        if key not in sizes:
            sizes[key] = nodes(functions[key].node, (*callers, key))
        return sizes[key]

    def nodes(held: Iterable[NodeProto], callers: tuple[tuple[str, str, str], ...]) -> int:
        total = 0
        for node in held:
            key = (node.domain, node.op_type, node.overload)
            total += size(key, callers) if key in functions else 1
            total += sum(nodes(inner.node, callers) for inner in subgraphs(node))
            if total > MAX_NODES:
                raise _too_many(error)
        return total

    nodes(proto.graph.node, ())


def _check_graph(graph: GraphProto, depth: int, error: type[TersorError]) -> None:
    if depth > MAX_SUBGRAPHS:
        raise error(f"The model nests graphs in graphs (If, Loop, Scan) more than {MAX_SUBGRAPHS} deep.")
    if graph.sparse_initializer:
        raise error("The model holds sparse tensors, which are not read. Save it with dense ones.")
    if len(graph.node) > MAX_NODES:
        raise _too_many(error)
    for node in graph.node:
        _check_node(node, error)
        for inner in subgraphs(node):
            _check_graph(inner, depth + 1, error)


def _check_node(node: NodeProto, error: type[TersorError]) -> None:
    if node.domain == "ai.onnx":
        node.domain = ""
    kind = f"{node.domain[:80]}.{node.op_type[:80]}" if node.domain else node.op_type[:80]
    if node.domain not in ("", CONTRIB) or (node.domain == CONTRIB and node.op_type not in CONTRIB_OPS):
        raise error(
            f"The model uses the operator {kind!r}, which needs code of its own or is not one of a floating-point "
            "network. Export it with operators of ai.onnx alone."
        )
    if node.op_type in _QUANTIZED:
        raise error(f"The model is quantized already ({kind}): upload the floating-point one that it was made from.")
    if any(attribute.HasField("sparse_tensor") or attribute.sparse_tensors for attribute in node.attribute):
        raise error("The model holds sparse tensors, which are not read. Save it with dense ones.")


def _check_values(proto: ModelProto, error: type[TersorError]) -> None:
    for kind, values in (("input", proto.graph.input), ("output", proto.graph.output)):
        for value in values:
            if value.type.WhichOneof("value") not in (None, "tensor_type"):  # the checker asks for a type
                raise error(f"The {kind} {value.name[:200]!r} is no tensor; only tensors can be fed and compared.")


def _checked(proto: ModelProto, error: type[TersorError]) -> ModelProto:
    """Passes onnx's checker, with its shape inference, which also says how large values become."""
    try:
        onnx.checker.check_model(proto)
        # What full_check adds.
        inferred = onnx.shape_inference.infer_shapes(skeleton(proto), check_type=True, strict_mode=True)
    except Exception as failure:  # the library's C++ errors share no class
        raise error(f"onnx's checker refuses the file: {_reason(failure)}") from failure
    # Apart, since following the sizes that a graph computes out of its constants can be made to abort and to take any
    # memory. Where it does, the limits on the process that runs the graph have the last word.
    for fault in (_too_large(inferred), apart(lambda: _too_large(_followed(proto)), FOLLOWING_BYTES)):
        if fault:
            raise error(fault)
    return proto


def _followed(proto: ModelProto) -> ModelProto:
    return onnx.shape_inference.infer_shapes(skeleton(proto), data_prop=True)


def _too_large(inferred: ModelProto) -> str:
    """What is wrong with the first value that is too large; nothing where none is."""
    for graph in graphs(inferred.graph):
        for value in (*graph.value_info, *graph.output):
            size = 4
            for dimension in value.type.tensor_type.shape.dim:
                size *= max(1, dimension.dim_value)
            if size > MAX_SAMPLE_BYTES:
                return (
                    f"The value {value.name[:200]!r} inside the model would take {size} bytes for one sample; at most "
                    f"{MAX_SAMPLE_BYTES} are taken."
                )
    return ""


def _reason(failure: Exception) -> str:
    """What the checker says, without its headings."""
    lines = [line for line in str(failure).splitlines() if line.strip() and not line.startswith("==>")]
    said = " ".join(lines[:2])[:400]
    return said if said.endswith(".") else f"{said}."


def _too_many(error: type[TersorError]) -> TersorError:
    return error(f"The model has more than {MAX_NODES} nodes; at most that many are taken.")
