"""The module under construction while a graph is imported: an fx graph, layers, weights and constants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from worker.loading.onnx_ops.errors import Unsupported
from worker.loading.onnx_ops.host import Host
from worker.loading.onnx_ops.names import Names
from worker.loading.onnx_ops.origins import Origin, Select, whole

# An integer constant of so many elements at most is a host value: shapes, axes, pads, index lists.
MAX_HOST_CONSTANT = 64
# Constants are computed ahead up to this many elements; what would grow beyond is computed when the module runs.
MAX_FOLDED = 1 << 24
# Beyond this a constant masks something out and is no weight.
LARGEST_WEIGHT = 1e4

_TORCH_TYPES: dict[int, torch.dtype] = {
    # Everything is computed in float32, whatever the file holds.
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float32,
    TensorProto.BFLOAT16: torch.float32,
    TensorProto.DOUBLE: torch.float32,
    TensorProto.BOOL: torch.bool,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    # torch computes little in the larger unsigned types; int64 holds their values.
    TensorProto.UINT16: torch.int64,
    TensorProto.UINT32: torch.int64,
    TensorProto.UINT64: torch.int64,
}


@dataclass(frozen=True)
class Constant:
    """A tensor known when the graph is imported.

    `source` is the initializer (or the Constant node's output) that `tensor` is a view of; None where it was computed.
    """

    tensor: Tensor
    source: str | None


Argument: TypeAlias = fx.Node | Constant | Host
"""A value of the graph at import time: computed when the module runs, or known already."""


def torch_type(data_type: int) -> torch.dtype:
    """The torch dtype for an ONNX data type. Raises Unsupported."""
    if data_type not in _TORCH_TYPES:
        raise Unsupported(f"works on values of type {helper.tensor_dtype_to_string(data_type)}")
    return _TORCH_TYPES[data_type]


def read_tensor(proto: TensorProto) -> Tensor:
    """A tensor of the file as torch computes with it: a copy, float32 for every floating type."""
    array = numpy_helper.to_array(proto)
    if proto.data_type == TensorProto.BFLOAT16:  # NumPy has the type from another library, torch takes NumPy's own
        array = array.astype("float32")
    return torch.tensor(array).to(torch_type(proto.data_type))


class Builder:
    """The module under construction: an fx graph, and a root that holds its layers, weights and constants."""

    def __init__(self, shapes: Mapping[str, tuple[int | None, ...]], initializers: frozenset[str]) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.names = Names()
        self.values: dict[str, Argument] = {}
        self.shapes = shapes
        self.origins: list[Origin] = []
        # Sources that something else was computed of: they must stay what they are when weights change.
        self.pinned: set[str] = set()
        # Sources that gave a layer its name.
        self.named: set[str] = set()
        # Whether the batch is 1 in the file, and shapes that begin with 1 mean the batch.
        self.fixed_batch = False
        # The first input: what is made of nothing is made on its device.
        self.anchor: fx.Node | None = None
        # Nodes that give host values: sizes, and what is computed of nothing else.
        self.hosts: set[fx.Node] = set()
        # How often each value is read.
        self.uses: Counter[str] = Counter()
        self._initializers = initializers
        self._attributes: dict[tuple[Any, ...], str] = {}
        self._shared: dict[tuple[Any, ...], nn.Parameter] = {}
        self._held: list[Tensor] = []  # what keys name by its address must not be freed

    def fold(self, function: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """The value of a function of constants; None where it is better computed when the module runs."""
        held = [value for value in flat(arguments) if isinstance(value, Constant)]
        if held and not _stays_small(function, arguments, options, sum(value.tensor.numel() for value in held)):
            return None
        with torch.no_grad():
            result = function(*mapped(tuple(arguments), _tensor_of), **options)
        return mapped(result, lambda value: self._traced(value, held) if isinstance(value, Tensor) else value)

    def _traced(self, result: Tensor, held: Sequence[Constant]) -> Argument:
        """The result as a constant: traceable to its source where it is a view of it."""
        for constant in held:
            if constant.source is not None and _same_memory(constant.tensor, result):
                return Constant(result, constant.source)
        self.pinned.update(constant.source for constant in held if constant.source is not None)
        return Constant(result, None)

    def is_weight(self, constant: Constant) -> bool:
        """Whether a constant that layers add or multiply is to be trained.

        Constant nodes hold literals, except in files that keep their weights in them.
        """
        values = constant.tensor
        return (
            constant.source is not None
            and (constant.source in self._initializers or not self._initializers)
            and values.is_floating_point()
            and values.numel() > 1
            and bool(values.isfinite().all())
            and float(values.abs().max()) < LARGEST_WEIGHT
        )

    def attribute(self, constant: Constant, trained: tuple[int, int] | None) -> fx.Node:
        """A constant as an attribute of the module; `trained` is the node and position that a parameter serves."""
        key = (_view_key(constant.tensor), trained is not None)
        if key not in self._attributes:
            path = self.names.fresh(constant.source or "constant")
            owner, name = self.owner(path)
            values = constant.tensor.clone(memory_format=torch.contiguous_format)
            if trained is None:
                owner.register_buffer(name, values)
                self.pinned.update([constant.source] if constant.source is not None else [])
            else:
                owner.register_parameter(name, nn.Parameter(values))
            self._attributes[key] = path
            self._held.append(constant.tensor)
        path = self._attributes[key]
        if trained is not None:
            self.record(path, constant, trained, whole)
        return self.graph.get_attr(path)

    def layer(self, name: str, layer: nn.Module) -> str:
        """Gives a layer a place, named after the tensor `name`; returns its path."""
        path = self.names.layer(name)
        owner, last = self.owner(path)
        owner.add_module(last, layer)
        return path

    def assign(
        self, path: str, attribute: str, constant: Constant, place: tuple[int, int], select: Select = whole
    ) -> None:
        """Gives a weight of the layer at `path` its values.

        Matrices that the file has once are one parameter, wherever they are used: they are tied.
        """
        layer = self.root.get_submodule(path)
        values = select(constant.tensor)
        if attribute in layer._buffers:
            layer._buffers[attribute] = values.clone(memory_format=torch.contiguous_format)
        else:
            key = (_view_key(values), values.untyped_storage().data_ptr())
            tied = self._shared.get(key) if values.ndim > 1 and _same_memory(values, constant.tensor) else None
            if tied is None:
                tied = nn.Parameter(values.clone(memory_format=torch.contiguous_format))
                self._shared[key] = tied
                self._held.append(values)
            layer.register_parameter(attribute, tied)
        self.record(f"{path}.{attribute}", constant, place, select)

    def record(self, path: str, constant: Constant, place: tuple[int, int], select: Select) -> None:
        """Notes where a weight came from."""
        values = constant.tensor
        self.origins.append(
            Origin(
                path,
                *place,
                constant.source,
                tuple(values.shape),
                values.stride(),
                int(values.storage_offset()),
                select,
                values if constant.source is None else None,
            )
        )

    def owner(self, path: str) -> tuple[nn.Module, str]:
        """The module that holds what lies at a path, made where it is missing, and the last part of the path."""
        *parents, last = path.split(".")
        owner = self.root
        for part in parents:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        return owner, last


def _view_key(values: Tensor) -> tuple[Any, ...]:
    """Equal for two views of the same elements in the same order."""
    return values.data_ptr(), tuple(values.shape), values.stride()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _stays_small(
    function: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any], before: int
) -> bool:
    """Tries on the meta device, where a tensor has a shape and no memory."""
    try:
        with torch.no_grad(), torch.device("meta"):
            result = function(*mapped(tuple(arguments), _meta_of), **options)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, Unsupported):  # the values decide the shape
        return False
    return sum(value.numel() for value in flat((result,)) if isinstance(value, Tensor)) <= max(MAX_FOLDED, 2 * before)


def _tensor_of(value: Any) -> Any:
    return value.tensor if isinstance(value, Constant) else value


def _meta_of(value: Any) -> Any:
    return value.tensor.to("meta") if isinstance(value, Constant) else value


def flat(values: Sequence[Any]) -> list[Any]:
    """The items of nested lists and tuples."""
    return [item for value in values for item in (flat(value) if isinstance(value, list | tuple) else (value,))]


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Nested tuples of the function's values."""
    if isinstance(value, list | tuple):
        return tuple(mapped(item, function) for item in value)
    return function(value)
