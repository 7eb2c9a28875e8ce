"""The JSON inside an exported program, as pydantic models: what torch.export (schema 8) writes, and nothing more.

Every name, number and expression is held to a grammar here, since loading turns names into the code of a forward pass.
Kinds of argument that no plain network needs (custom objects, operators as values, nested lists) are not part of it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from worker.vetting.expressions import Expression, parse_expression

MAX_NODES = (
    100_000  # with those of inner graphs; an unrolled recurrent network has thousands, a large language model too
)
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 16

# torch's numbers of its dtypes; complex, quantized and float8 weights cannot be trained.
DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    12: "bool",
    13: "bfloat16",
}
ITEM_BYTES = {
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "bool": 1,
    "bfloat16": 2,
}
LAYOUTS = {7: "strided"}
MEMORY_FORMATS = {1: "contiguous_format", 2: "channels_last", 3: "channels_last_3d", 4: "preserve_format"}


def _known(table: dict[int, str], what: str) -> AfterValidator:
    def check(number: int) -> int:
        if number not in table:
            raise ValueError(f"{what} {number} is not taken; {', '.join(table.values())} are")
        return number

    return AfterValidator(check)


def _arithmetic(text: str) -> str:
    parse_expression(text)
    return text


Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=1024)]
QualifiedName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*$", max_length=1024)]
Int = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Size = Annotated[int, Field(ge=0, lt=1 << 48)]
Real = float | Literal["Infinity", "-Infinity", "NaN"]
# Modes ("floor", "same"), and the equation of an einsum.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_,.> -]*$", max_length=128)]
Text = Annotated[str, Field(max_length=1 << 20)]  # read by nobody
DtypeNumber = Annotated[int, _known(DTYPES, "dtype")]
LayoutNumber = Annotated[int, _known(LAYOUTS, "layout")]
MemoryFormatNumber = Annotated[int, _known(MEMORY_FORMATS, "memory format")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class OneOf(Strict):
    """An object with exactly one key, which says of what kind its value is."""

    @model_validator(mode="after")
    def _exactly_one(self) -> OneOf:
        if len(self.model_fields_set) != 1 or self.value is None:
            raise ValueError(f"one of {', '.join(list(type(self).model_fields)[:4])}, … was expected")
        return self

    @property
    def kind(self) -> str:
        return next(iter(self.model_fields_set))

    @property
    def value(self) -> Any:
        return getattr(self, self.kind)


class Hint(OneOf):
    as_int: Int | None = None
    as_bool: bool | None = None
    as_float: Real | None = None


class SymbolicExpression(Strict):
    expr_str: Annotated[str, AfterValidator(_arithmetic)]
    hint: Hint | None = None

    @property
    def parsed(self) -> Expression:
        return parse_expression(self.expr_str)


class SymInt(OneOf):
    as_expr: SymbolicExpression | None = None
    as_int: Int | None = None


class SymFloat(OneOf):
    as_expr: SymbolicExpression | None = None
    as_float: Real | None = None


class SymBool(OneOf):
    as_expr: SymbolicExpression | None = None
    as_bool: bool | None = None


class Device(Strict):
    type: Literal["cpu", "cuda", "mps", "xpu", "meta"]
    index: Annotated[int, Field(ge=0, le=64)] | None = None


class TensorMeta(Strict):
    dtype: DtypeNumber
    sizes: Annotated[list[SymInt], Field(max_length=MAX_DIMENSIONS)]
    requires_grad: bool
    device: Device
    strides: Annotated[list[SymInt], Field(max_length=MAX_DIMENSIONS)]
    storage_offset: SymInt
    layout: LayoutNumber


class Named(Strict):
    """A tensor by name."""

    name: Name


class IntArgument(OneOf):
    as_name: Name | None = None
    as_int: Int | None = None


class FloatArgument(OneOf):
    as_name: Name | None = None
    as_float: Real | None = None


class BoolArgument(OneOf):
    as_name: Name | None = None
    as_bool: bool | None = None


class OptionalTensor(OneOf):
    as_tensor: Named | None = None
    as_none: bool | None = None


class InnerGraph(Strict):
    name: Name
    graph: Graph


class Argument(OneOf):
    as_none: bool | None = None
    as_tensor: Named | None = None
    as_tensors: list[Named] | None = None
    as_int: Int | None = None
    as_ints: list[Int] | None = None
    as_float: Real | None = None
    as_floats: list[Real] | None = None
    as_string: Word | None = None
    as_sym_int: IntArgument | None = None
    as_sym_ints: list[IntArgument] | None = None
    as_scalar_type: DtypeNumber | None = None
    as_memory_format: MemoryFormatNumber | None = None
    as_layout: LayoutNumber | None = None
    as_device: Device | None = None
    as_bool: bool | None = None
    as_bools: list[bool] | None = None
    as_sym_bool: BoolArgument | None = None
    as_sym_float: FloatArgument | None = None
    as_optional_tensor: OptionalTensor | None = None
    as_optional_tensors: list[OptionalTensor] | None = None
    as_graph: InnerGraph | None = None


class Input(Strict):
    """One argument of a node. An inner graph's call has no names for them."""

    name: Annotated[str, Field(pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$", max_length=64)]
    arg: Argument
    kind: Literal[0, 1, 2] | None = None


class Node(Strict):
    target: Annotated[str, Field(max_length=256)]
    inputs: Annotated[list[Input], Field(max_length=64)]
    outputs: Annotated[list[Argument], Field(max_length=1024)]
    metadata: dict[Text, Text]
    is_hop_single_tensor_return: bool | None = None
    name: Name | None = None


class Graph(Strict):
    inputs: Annotated[list[Argument], Field(max_length=MAX_TENSORS)]
    outputs: Annotated[list[Argument], Field(max_length=1024)]
    nodes: Annotated[list[Node], Field(max_length=MAX_NODES)]
    tensor_values: dict[Name, TensorMeta]
    sym_int_values: dict[Name, SymInt]
    sym_bool_values: dict[Name, SymBool]
    is_single_tensor_return: bool = False
    custom_obj_values: Annotated[dict[Text, Any], Field(max_length=0)] = Field(default_factory=dict)
    sym_float_values: dict[Name, SymFloat] = Field(default_factory=dict)


class ParameterInput(Strict):
    arg: Named
    parameter_name: QualifiedName


class BufferInput(Strict):
    arg: Named
    buffer_name: QualifiedName
    persistent: bool


class ConstantInput(Strict):
    arg: Named
    tensor_constant_name: QualifiedName


class UserInput(Strict):
    arg: Argument


class InputSpec(OneOf):
    user_input: UserInput | None = None
    parameter: ParameterInput | None = None
    buffer: BufferInput | None = None
    tensor_constant: ConstantInput | None = None
    constant_input: dict[Text, Any] | None = None
    custom_obj: dict[Text, Any] | None = None
    token: dict[Text, Any] | None = None


class UserOutput(Strict):
    arg: Argument


class BufferMutation(Strict):
    arg: Named
    buffer_name: QualifiedName


class OutputSpec(OneOf):
    user_output: UserOutput | None = None
    buffer_mutation: BufferMutation | None = None
    loss_output: dict[Text, Any] | None = None
    gradient_to_parameter: dict[Text, Any] | None = None
    gradient_to_user_input: dict[Text, Any] | None = None
    user_input_mutation: dict[Text, Any] | None = None
    token: dict[Text, Any] | None = None
    parameter_mutation: dict[Text, Any] | None = None


class GraphSignature(Strict):
    input_specs: Annotated[list[InputSpec], Field(max_length=MAX_TENSORS)]
    output_specs: Annotated[list[OutputSpec], Field(max_length=1024)]


class CallSignature(Strict):
    inputs: list[Any]
    outputs: list[Any]
    in_spec: Text
    out_spec: Text
    forward_arg_names: list[Text] | None = None


class CallEntry(Strict):
    fqn: Text
    signature: CallSignature | None = None


class GraphModule(Strict):
    graph: Graph
    signature: GraphSignature
    module_call_graph: list[CallEntry]
    metadata: dict[Text, Text] = Field(default_factory=dict)
    treespec_namedtuple_fields: dict[Text, Any] = Field(default_factory=dict)


class RangeConstraint(Strict):
    min_val: Int | None
    max_val: Int | None


class Version(Strict):
    major: Int
    minor: Int


class Program(Strict):
    graph_module: GraphModule
    opset_version: dict[Text, Int]
    range_constraints: dict[Text, RangeConstraint]
    schema_version: Version
    verifiers: list[Text] = Field(default_factory=list)
    torch_version: Text = "<=2.4"
    guards_code: list[Text] = Field(default_factory=list)


class Payload(Strict):
    """Where the bytes of a weight or constant lie in the archive."""

    path_name: Annotated[str, Field(max_length=64)]
    is_param: bool
    use_pickle: bool
    tensor_meta: TensorMeta | None


class PayloadConfig(Strict):
    config: Annotated[dict[QualifiedName, Payload], Field(max_length=MAX_TENSORS)]


class TreeNode(Strict):
    """A part of a treespec: how arguments or results nest. `type` names a Python class, which is only compared."""

    type: Annotated[str, Field(max_length=256)] | None
    context: Text | None
    children_spec: list[TreeNode]


for _model in (InnerGraph, Argument, Input, Node, Graph, TreeNode):
    _model.model_rebuild()
