"""A vetted program as an fx graph: placeholders, attributes, operators of aten. What it was exported with stays there.

Left out: assertions, outputs other than the logits, and what only they needed. Inner graphs (`torch.no_grad` blocks)
are laid open. Devices become that of the first input, so that the program runs wherever its weights are.
"""

from __future__ import annotations

import keyword
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from app.contract.errors import ModelRejected
from worker.vetting.operators import ASSERTIONS, AUTOCAST, NO_GRAD
from worker.vetting.pt2 import HOW_TO_EXPORT, ProgramFile
from worker.vetting.pt2_schema import DTYPES, MEMORY_FORMATS, Argument, Graph, Input, InputSpec, Named, Node, TensorMeta

# node.meta: the dtypes that arguments had before a half-precision program was widened, by the argument's name.
NARROW = "narrow_dtypes"
# node.meta: where in the module tree a node was recorded, and how many dimensions its tensor has.
PATH, RANK = "path", "rank"

_SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "math.trunc": math.trunc,
    "torch._sym_sqrt": torch.sym_sqrt,
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum")},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_int", "sym_float", "sym_sqrt")},
}
_RESULTS = frozenset({"Tensor", "List[Tensor]", "int", "SymInt"})
_NO_TENSORS = ("custom_obj", "token", "constant_input")
# These write their running statistics and are replaced by a layer that does so in training alone.
_WRITES_STATISTICS = frozenset({"aten::native_batch_norm", "aten::_native_batch_norm_legit"})


@dataclass(frozen=True)
class TensorInput:
    """An argument of the program. A size is None where it may vary; `example` is a shape that it was exported with."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    example: tuple[int, ...]


@dataclass(frozen=True)
class ProgramGraph:
    """`attributes` are the tensors that the graph names, with whether each belongs to the state dict."""

    graph: fx.Graph
    inputs: tuple[TensorInput, ...]
    attributes: Mapping[str, bool]


def build_graph(file: ProgramFile, narrow: frozenset[torch.dtype]) -> ProgramGraph:
    """The graph of a program, computing in float32 wherever it would in one of the dtypes of `narrow`.

    Raises ModelRejected where the program takes something else than tensors, or names a value before it is there.
    """
    return _Builder(file, narrow).build()


class _Builder:
    def __init__(self, file: ProgramFile, narrow: frozenset[torch.dtype]) -> None:
        self._file = file
        self._narrow = narrow
        self._graph = fx.Graph()
        self._inputs: list[TensorInput] = []
        self._attributes: dict[str, bool] = {}
        self._device: fx.Node | None = None

    def build(self) -> ProgramGraph:
        module = self._file.program.graph_module
        specs, call = module.signature.input_specs, self._file.call
        if len(specs) != len(module.graph.inputs):
            raise ModelRejected("The program's signature does not fit its graph: the file is damaged.")
        if strange := next((spec.kind for spec in specs if spec.kind in _NO_TENSORS), None):
            raise ModelRejected(
                f"The program takes an argument that is no tensor ({strange}): what is always the same belongs inside "
                f"of forward. {HOW_TO_EXPORT}"
            )
        scope = self._placeholders(module.graph, specs) | self._tensors(specs)
        self._nodes(module.graph, scope)
        outputs = [
            given
            for given, spec in zip(module.graph.outputs, module.signature.output_specs, strict=False)
            if spec.user_output is not None
        ]
        if call.output >= len(outputs) or outputs[call.output].as_tensor is None:
            raise ModelRejected("The program does not give the tensor that its signature promises.")
        self._graph.output(self._value(outputs[call.output], scope))
        self._graph.eliminate_dead_code()
        return ProgramGraph(self._graph, tuple(self._inputs), self._attributes)

    def _placeholders(self, graph: Graph, specs: Sequence[InputSpec]) -> dict[str, fx.Node]:
        given = [spec.user_input.arg for spec in specs if spec.user_input is not None]
        call = self._file.call
        if any(argument.as_tensor is None for argument in given) or len(given) != call.positional + len(call.keywords):
            raise ModelRejected(
                f"The program takes an argument that is no tensor: what is always the same belongs inside of forward. "
                f"{HOW_TO_EXPORT}"
            )
        names = [argument.as_tensor.name for argument in given if argument.as_tensor is not None]
        called = [*names[: call.positional], *call.keywords]
        if not names or len(set(called)) != len(called) or any(map(keyword.iskeyword, called)):
            raise ModelRejected("The program has no input, or two of the same name.")
        scope = {}
        for name, own in zip(called, names, strict=True):
            meta = graph.tensor_values.get(own)
            if meta is None:
                raise ModelRejected(f"The program does not say of what shape its input {name!r} is.")
            scope[own] = self._graph.placeholder(name)
            scope[own].meta[RANK] = len(meta.sizes)
            self._inputs.append(_input(name, meta))
        return scope

    def _tensors(self, specs: Sequence[InputSpec]) -> dict[str, fx.Node]:
        """A node for each weight, buffer and constant; the ones that nothing uses go again."""
        scope = {}
        for spec in specs:
            if spec.parameter is not None:
                name, own, persistent = spec.parameter.parameter_name, spec.parameter.arg.name, True
            elif spec.buffer is not None:
                name, own, persistent = spec.buffer.buffer_name, spec.buffer.arg.name, spec.buffer.persistent
            elif spec.tensor_constant is not None:
                name, own, persistent = spec.tensor_constant.tensor_constant_name, spec.tensor_constant.arg.name, False
            else:
                continue
            self._attributes[name] = persistent
            scope[own] = self._graph.get_attr(name)
        return scope

    def _nodes(self, graph: Graph, scope: dict[str, fx.Node]) -> None:
        for node in graph.nodes:
            if node.target in (NO_GRAD, AUTOCAST):
                self._block(node, scope)
            elif node.target.startswith("torch.ops."):
                self._operator(node, scope, graph)
            else:
                name = node.target.removeprefix("_operator.")
                function = _SIZE_FUNCTIONS.get(node.target) or getattr(operator, name)
                arguments = tuple(self._value(given.arg, scope) for given in node.inputs)
                self._name(node.outputs, self._graph.call_function(function, arguments), scope)

    def _operator(self, node: Node, scope: dict[str, fx.Node], graph: Graph) -> None:
        name, overload = node.target.split(".")[-2:]
        if name in ASSERTIONS:
            return
        target = _overload(name, overload)
        args, kwargs, narrow = self._bind(target, node.inputs, scope)
        made = self._graph.call_function(target, args, kwargs)
        made.meta[PATH] = _path(node.metadata.get("nn_module_stack", ""))
        if narrow:
            made.meta[NARROW] = narrow
        self._name(node.outputs, made, scope)
        for argument in node.outputs:
            if argument.as_tensor is not None and argument.as_tensor.name in graph.tensor_values:
                name = argument.as_tensor.name
                scope[name].meta[RANK] = len(graph.tensor_values[name].sizes)

    def _bind(
        self, target: torch._ops.OpOverload, inputs: Sequence[Input], scope: Mapping[str, fx.Node]
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, torch.dtype]]:
        """Arguments in the order of the operator's schema. Raises ModelRejected for one that it does not have."""
        given = {one.name: one.arg for one in inputs}
        known = {argument.name for argument in target._schema.arguments}
        if len(given) != len(inputs) or not given.keys() <= known:
            raise ModelRejected(f"The program calls {target} with arguments that it does not take.")
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        narrow = {}
        gap = False
        for argument in target._schema.arguments:
            if argument.name not in given:
                gap = True
                continue
            value = self._value(given[argument.name], scope)
            if isinstance(value, torch.dtype) and value in self._narrow:
                narrow[argument.name], value = value, torch.float32
            if argument.kwarg_only or gap:
                kwargs[argument.name] = value
            else:
                args.append(value)
        return tuple(args), kwargs, narrow

    def _block(self, node: Node, scope: dict[str, fx.Node]) -> None:
        """Lays open `with torch.set_grad_enabled(…):` and `with torch.autocast(…, enabled=False):`."""
        arguments = [given.arg for given in node.inputs]
        at = next((index for index, argument in enumerate(arguments) if argument.as_graph is not None), None)
        flag = arguments[0 if node.target == NO_GRAD else 2].as_bool if len(arguments) > 2 else None
        if at is None or flag is None or arguments[at].as_graph is None:
            raise ModelRejected(f"The program's {node.target!r} is damaged.")
        if node.target == AUTOCAST and flag:
            raise ModelRejected("The program computes under torch.autocast: export it without, in float32.")
        inner = arguments[at].as_graph.graph  # type: ignore[union-attr]  # asked above
        names = [_name_of(argument) for argument in inner.inputs]
        operands = [self._value(argument, scope) for argument in arguments[at + 1 :]]
        if len(names) != len(operands) or len(inner.outputs) != len(node.outputs):
            raise ModelRejected(f"The program's {node.target!r} does not fit what it is called with.")
        inside = dict(zip(names, operands, strict=True))
        self._nodes(inner, inside)
        for outer, result in zip(node.outputs, inner.outputs, strict=True):
            value = self._value(result, inside)
            if node.target == NO_GRAD and not flag and result.as_tensor is not None:
                value = self._graph.call_function(torch.ops.aten.detach.default, (value,))
            _put(scope, _name_of(outer), value)

    def _name(self, outputs: Sequence[Argument], made: fx.Node, scope: dict[str, fx.Node]) -> None:
        """Names the results of a node; one of several, or in a list, is taken out of it first."""
        if len(outputs) == 1 and outputs[0].as_tensors is None:
            if outputs[0].as_none is None:
                _put(scope, _name_of(outputs[0]), made)
            return
        entries: Sequence[Argument | Named] = (outputs[0].as_tensors or ()) if len(outputs) == 1 else outputs
        for index, entry in enumerate(entries):
            if isinstance(entry, Argument) and entry.as_none is not None:
                continue
            item = self._graph.call_function(operator.getitem, (made, index))
            if isinstance(entry, Argument):
                self._name([entry], item, scope)
            else:
                _put(scope, entry.name, item)

    def _value(self, argument: Argument, scope: Mapping[str, fx.Node]) -> Any:
        kind, value = argument.kind, argument.value
        match kind:
            case "as_none":
                return None
            case "as_tensor":
                return _get(scope, value.name)
            case "as_tensors":
                return [_get(scope, entry.name) for entry in value]
            case "as_optional_tensor":
                return None if value.as_tensor is None else _get(scope, value.as_tensor.name)
            case "as_optional_tensors":
                return [None if one.as_tensor is None else _get(scope, one.as_tensor.name) for one in value]
            case "as_float":
                return float(value)
            case "as_floats":
                return [float(one) for one in value]
            case "as_sym_int" | "as_sym_bool" | "as_sym_float":
                return _symbolic(value, scope)
            case "as_sym_ints":
                return [_symbolic(one, scope) for one in value]
            case "as_scalar_type":
                return getattr(torch, DTYPES[value])
            case "as_memory_format":
                return getattr(torch, MEMORY_FORMATS[value])
            case "as_layout":
                return torch.strided
            case "as_device":
                return self._device_node()
            case "as_graph":
                raise ModelRejected("The program takes a graph as an argument where none belongs.")
        return value  # as_int, as_ints, as_bool, as_bools, as_string

    def _device_node(self) -> fx.Node:
        """The device of the first input, read when the program runs."""
        if self._device is None:
            placeholders = [node for node in self._graph.nodes if node.op == "placeholder"]
            with self._graph.inserting_after(placeholders[-1]):
                self._device = self._graph.call_function(getattr, (placeholders[0], "device"))
        return self._device


def _overload(name: str, overload: str) -> torch._ops.OpOverload:
    """The operator. Raises ModelRejected unless it computes tensors or sizes and writes into none but its first."""
    packet = getattr(torch.ops.aten, name)
    if overload not in packet.overloads():
        raise ModelRejected(f"torch {torch.__version__} has no operator aten.{name}.{overload}.")
    target: torch._ops.OpOverload = getattr(packet, overload)
    schema = target._schema
    written = [i for i, argument in enumerate(schema.arguments) if argument.alias_info and argument.alias_info.is_write]
    plain = all(str(result.type) in _RESULTS for result in schema.returns) and schema.returns
    if not plain or (written not in ([], [0]) and schema.name not in _WRITES_STATISTICS):
        raise ModelRejected(f"The program calls the operator {target}, which is not among those that are taken.")
    return target


def _input(name: str, meta: TensorMeta) -> TensorInput:
    shape: list[int | None] = []
    example = []
    for size in meta.sizes:
        if size.as_int is not None:
            shape.append(size.as_int)
            example.append(size.as_int)
            continue
        assert size.as_expr is not None
        if size.as_expr.parsed.symbol is None:
            raise ModelRejected(
                f"A size of the input {name!r} depends on another one ({size.as_expr.expr_str[:80]}): export it with "
                "torch.export.Dim.DYNAMIC for each size that varies."
            )
        hint = size.as_expr.hint
        shape.append(None)
        example.append(hint.as_int if hint is not None and hint.as_int is not None else 0)
    return TensorInput(name, DTYPES[meta.dtype], tuple(shape), tuple(example))


def _path(stack: str) -> str:
    """The module that recorded a node: of `…;L__self__conv,encoder.conv,torch.nn.modules.conv.Conv2d` the middle."""
    parts = stack.rpartition(";")[2].split(",")
    path = parts[1].partition("@")[0] if len(parts) == 3 else ""
    return path if all(part.isidentifier() or part.isdecimal() for part in path.split(".")) else ""


def _symbolic(argument: Any, scope: Mapping[str, fx.Node]) -> Any:
    if argument.kind == "as_name":
        return _get(scope, argument.as_name)
    return float(argument.value) if argument.kind == "as_float" else argument.value


def _name_of(argument: Argument) -> str:
    if argument.as_tensor is not None:
        return argument.as_tensor.name
    symbol = argument.as_sym_int or argument.as_sym_bool or argument.as_sym_float
    if symbol is None or symbol.as_name is None:
        raise ModelRejected(f"The program has a result of the kind {argument.kind!r}, which is not taken.")
    return symbol.as_name


def _get(scope: Mapping[str, fx.Node], name: str) -> fx.Node:
    if name not in scope:
        raise ModelRejected(f"The program uses the value {name[:80]!r} before anything gives it: the file is damaged.")
    return scope[name]


def _put(scope: dict[str, fx.Node], name: str, node: fx.Node) -> None:
    if name in scope:
        raise ModelRejected(f"The program names two values {name[:80]!r}: the file is damaged.")
    scope[name] = node
