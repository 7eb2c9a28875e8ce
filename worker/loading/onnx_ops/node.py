"""One node of an ONNX graph, as the builder of its operator sees it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from onnx import NodeProto, defs, helper
from torch import fx, nn

from worker.loading.onnx_ops.build import MAX_HOST_CONSTANT, Argument, Builder, Constant, flat, mapped
from worker.loading.onnx_ops.errors import Unsupported
from worker.loading.onnx_ops.host import Host, tensor
from worker.loading.onnx_ops.origins import Select, whole

# A constant that takes part in one of these is like a bias, a gain or a table, and is trained.
TRAINED_IN = frozenset({"Add", "Sub", "Mul", "Div", "MatMul", "Gemm", "Concat", "Expand", "Gather", "Conv", "PRelu"})


class Node:
    """One node of the ONNX graph while it is imported."""

    def __init__(self, builder: Builder, proto: NodeProto, index: int, opset: int) -> None:
        self.builder = builder
        self.proto = proto
        self.index = index
        self.opset = opset
        self.op = proto.op_type
        self._attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in proto.attribute}

    @property
    def since(self) -> int:
        """The opset in which the operator got the meaning that it has here."""
        return int(defs.get_schema(self.op, self.opset, self.proto.domain).since_version)

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute's value; strings as str, lists as tuples."""
        value = self._attributes.get(name, default)
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        if isinstance(value, list):
            return tuple(item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in value)
        return value

    def has(self, position: int) -> bool:
        """Whether the input is there."""
        return position < len(self.proto.input) and self.proto.input[position] != ""

    def wants(self, position: int) -> bool:
        """Whether anybody may use the output."""
        return position < len(self.proto.output) and self.proto.output[position] != ""

    def value(self, position: int) -> Argument:
        """An input; small whole numbers and single floats that are known are host values."""
        value = self.builder.values[self.proto.input[position]]
        return host_value(value) if isinstance(value, Constant) else value

    def tensor(self, position: int) -> fx.Node | Constant:
        """An input as a tensor or a constant, never as a host value, where that is known."""
        value = self.builder.values[self.proto.input[position]]
        return value if isinstance(value, fx.Node | Constant) else Constant(tensor(value), None)

    def values(self) -> list[Argument]:
        """All inputs, which the operator must not leave out; beside sizes, short vectors are host values as well."""
        found = [self.value(position) for position in range(len(self.proto.input))]
        if any(isinstance(value, fx.Node) and value in self.builder.hosts for value in found):
            return [short_vector(value) for value in found]
        return found

    def constant(self, position: int) -> Constant | None:
        """An input as a tensor that is known already, else None."""
        if not self.has(position):
            return None
        value = self.builder.values[self.proto.input[position]]
        if isinstance(value, Constant):
            return value
        return None if isinstance(value, fx.Node) else Constant(tensor(value), None)

    def known(self, position: int, what: str) -> Any:
        """An input as numbers, a nested list for more than one dimension. Raises Unsupported where it is computed."""
        constant = self.constant(position)
        if constant is None:
            raise Unsupported(f"computes its {what} while it runs")
        if constant.tensor.numel() > MAX_HOST_CONSTANT:
            raise Unsupported(f"has {constant.tensor.numel()} numbers as its {what}")
        return constant.tensor.tolist()

    def ints(self, name: str, position: int | None = None, default: Any = None) -> Any:
        """Whole numbers that are an attribute in some opsets and an input in others; None or a tuple."""
        if position is not None and self.has(position):
            numbers = self.known(position, name)
            return tuple(numbers) if isinstance(numbers, list) else (numbers,)
        return self.attribute(name, default)

    def shape(self, position: int) -> tuple[int | None, ...] | None:
        """What shape inference knows of an input; None where not even its rank is known."""
        constant = self.constant(position)
        return tuple(constant.tensor.shape) if constant else self.builder.shapes.get(self.proto.input[position])

    def rank(self, position: int) -> int:
        """An input's number of dimensions. Raises Unsupported where it is not known."""
        shape = self.shape(position)
        if shape is None:
            raise Unsupported("takes a tensor of an unknown number of dimensions")
        return len(shape)

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The function's value: known now where all arguments are, else a node of the graph."""
        if not any(isinstance(value, fx.Node) for value in flat(arguments)):
            folded = self.builder.fold(function, arguments, options)
            if folded is not None:
                return folded
        known = [value for value in flat(arguments) if isinstance(value, Constant)]
        made = self.builder.graph.call_function(function, mapped(arguments, self._plain), options)
        if not known and self.builder.hosts.issuperset(made.all_input_nodes):
            self.builder.hosts.add(made)
        return made

    def host(self, function: Callable[..., Host], *arguments: Any, **options: Any) -> Any:
        """The value of a function that gives sizes."""
        made = self.call(function, *arguments, **options)
        if isinstance(made, fx.Node):
            self.builder.hosts.add(made)
        return made

    def parts(self, values: Any, count: int) -> list[Any]:
        """The values of a call that gives several."""
        if isinstance(values, fx.Node):
            return [self.call(operator.getitem, values, index) for index in range(count)]
        return list(values)

    def layer(self, layer: nn.Module, weight: int, *arguments: Any) -> tuple[str, fx.Node]:
        """A layer named after the input `weight`, and the call of it; returns its path and the call."""
        path = self.builder.layer(self._weight_name(weight), layer)
        return path, self.builder.graph.call_module(path, mapped(arguments, self._plain))

    def assign(self, path: str, attribute: str, position: int, select: Select = whole) -> None:
        """Gives the layer at `path` a weight: what is `select`ed of a constant input."""
        constant = self.constant(position)
        assert constant is not None  # a builder asks before it makes a layer
        self.builder.assign(path, attribute, constant, (self.index, position), select)

    def _weight_name(self, position: int) -> str:
        """The file's tensor, or, where another layer is named after it, what the node calls it."""
        constant = self.constant(position)
        source = None if constant is None else constant.source
        if source is None or source in self.builder.named:
            return str(self.proto.input[position])
        self.builder.named.add(source)
        return source

    def _plain(self, value: Any) -> Any:
        """A value as an argument of an fx node."""
        if not isinstance(value, Constant):
            return value
        trained = self.op in TRAINED_IN and self.builder.is_weight(value)
        place = self._place(value) if trained else None
        return self.builder.attribute(value, place)

    def _place(self, constant: Constant) -> tuple[int, int] | None:
        """Which input the constant is; None for one that was computed on the way."""
        inputs = list(enumerate(self.proto.input))
        position = next((i for i, name in inputs if name and self.builder.values.get(name) is constant), None)
        return None if position is None else (self.index, position)


def host_value(constant: Constant) -> Argument:
    """The constant as numbers where it is short and whole, or a single float; else the constant itself."""
    values = constant.tensor
    if values.is_floating_point():
        return float(values) if values.ndim == 0 else constant
    if values.ndim > 1 or values.numel() > MAX_HOST_CONSTANT:
        return constant
    numbers = values.tolist()
    return tuple(numbers) if isinstance(numbers, list) else numbers


def short_vector(value: Argument) -> Argument:
    """A known vector of a few floats as numbers."""
    if not isinstance(value, Constant) or value.tensor.ndim > 1 or value.tensor.numel() > MAX_HOST_CONSTANT:
        return value
    numbers = value.tensor.tolist()
    return tuple(numbers) if isinstance(numbers, list) else float(numbers)
