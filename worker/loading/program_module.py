"""An fx graph and its tensors as a module with layers of torch.nn, under the names of the module that was exported."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from app.contract.errors import ModelRejected
from worker.loading.program_layers import Layer, layer_of
from worker.loading.program_nodes import arguments, attribute, is_plain, operator_name
from worker.vetting.boundary import first_line

_TREE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_COUNTER = "num_batches_tracked"
_DROPOUTS = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"})
# Operators that multiply by a matrix or kernel, with the arguments that can be one.
_MATRICES: dict[str, tuple[str, ...]] = {
    "linear": ("weight",),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "embedding", "bilinear"), ("weight",)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), ("weight",)),
    "addmm": ("mat1", "mat2"),
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "matmul": ("self", "other"),
    "mv": ("self",),
    "einsum": ("tensors",),
    "_weight_norm": ("v",),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), ("params",)),
}
# What may lie between a weight and the product: the same numbers in another shape.
_VIEWS = frozenset(
    {"t", "permute", "transpose", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"}
    | {"contiguous", "clone", "to", "chunk", "split", "split_with_sizes", "select", "slice", "unbind"}
)
MAX_HOPS = 8  # such views, one on another


class Holder(nn.Module):
    """Weights that no layer of torch.nn holds. `matrices` are the names of those that a product takes: they can be
    pruned like the weight of a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices: tuple[str, ...] = ()


class Program(fx.GraphModule):
    """A graph whose module tree is that of the model it was exported from.

    fx itself keeps only what the graph names and makes every buffer persistent; here a copy has all of the tree.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph, "Program")
        for name in _TREE:
            self.__dict__[name] = root.__dict__[name]

    def tree(self) -> nn.Module:
        """A module without a forward that shares the layers, weights and buffers of this one."""
        root = nn.Module()
        for name in _TREE:
            root.__dict__[name] = self.__dict__[name]
        root.training = self.training
        return root

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        copied = Program(copy.deepcopy(self.tree(), memo), copy.deepcopy(self.graph, memo))
        copied.training = self.training
        memo[id(self)] = copied
        return copied


def assemble(graph: fx.Graph, tensors: Mapping[str, Tensor], persistent: Mapping[str, bool]) -> Program:
    """Layers in place of operators on weights, in `graph`, and all tensors where their names say.

    A tensor that two names share stays shared. Raises ModelRejected where a layer whose behaviour depends on the mode
    (dropout, batch norm) cannot be told, and where names contradict each other.
    """
    return _Assembly(graph, tensors, persistent).assemble()


class _Assembly:
    def __init__(self, graph: fx.Graph, tensors: Mapping[str, Tensor], persistent: Mapping[str, bool]) -> None:
        self._graph = graph
        self._tensors = tensors
        self._persistent = persistent
        self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._aliases: dict[int, list[str]] = {}
        for name, tensor in tensors.items():
            self._aliases.setdefault(id(tensor), []).append(name)
        self._containers = {path for name in tensors for path in _parents(name)}
        self._layers: dict[str, Layer] = {}

    def assemble(self) -> Program:
        if clash := next((name for name in self._tensors if name in self._containers), None):
            raise ModelRejected(f"The program names both a tensor and a module {clash!r}: the file is damaged.")
        for node in list(self._graph.nodes):
            self._replace(node)
        self._drop_counters()
        for node in list(self._graph.nodes):
            if node.op == "get_attr" and not node.users:
                self._graph.erase_node(node)
            else:
                _refuse_leftover(node)
        root = self._tree()
        self._mark_matrices(root)
        return Program(root, self._graph)

    def _replace(self, node: fx.Node) -> None:
        try:
            layer = layer_of(node, self._shapes)
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as failure:
            raise ModelRejected(f"The program's {node.target} makes no layer: {first_line(failure)}") from failure
        path = None if layer is None else self._place(layer, node.meta.get("path", ""))
        if layer is None or path is None:
            return
        with self._graph.inserting_before(node):
            made = self._graph.call_module(path, layer.inputs)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        self._graph.erase_node(node)

    def _place(self, layer: Layer, hint: str) -> str | None:
        """Where in the tree a layer stands: where its weights do, or, without weights, where it was recorded."""
        for path in self._places(layer, hint):
            placed = self._layers.setdefault(path, layer)
            if (placed.kind, placed.key, placed.slots) == (layer.kind, layer.key, layer.slots):
                return path
        return None

    def _places(self, layer: Layer, hint: str) -> Iterator[str]:
        given = {slot: str(node.target) for slot, node in layer.slots.items() if node is not None}
        if not given:
            yield from self._free(layer, hint)
            return
        names = {slot: set(self._aliases[id(self._tensors[name])]) for slot, name in given.items()}
        first = next(iter(names))
        found = [name.removesuffix(f".{first}") for name in names[first] if name.endswith(f".{first}")]
        for path in sorted(found, key=lambda path: (path != hint, path)):
            fits = all(f"{path}.{slot}" in names[slot] for slot in names)
            if fits and not any(f"{path}.{slot}" in self._tensors for slot in layer.slots if slot not in names):
                yield path

    def _free(self, layer: Layer, hint: str) -> Iterator[str]:
        """The hint, where no weights stand there, then names below it."""
        own = layer.kind.lower()
        below = f"{hint}.{own}" if hint else own
        for path in (hint, below, *(f"{below}_{number}" for number in range(1, len(self._layers) + 2))):
            if path and path not in self._containers and path not in self._tensors:
                yield path

    def _drop_counters(self) -> None:
        """BatchNorm counts its batches itself; in an export in train mode a node does."""
        for node in list(self._graph.nodes):
            name = attribute(node.args[0]) if node.args else None
            if name is None or node.users or not operator_name(node).endswith("_"):
                continue
            path, _, counter = name.rpartition(".")
            if counter == _COUNTER and path in self._layers and "Norm" in self._layers[path].kind:
                self._graph.erase_node(node)

    def _tree(self) -> nn.Module:
        """The module tree in the order of the tensors, which is that of the state dict."""
        root = Holder()
        for name, tensor in self._tensors.items():
            path, _, attribute = name.rpartition(".")
            _attach(self._module(root, path), attribute, tensor, self._persistent.get(name, True))
        for path in self._layers:
            layer = self._module(root, path)
            for name, buffer in layer._buffers.items():
                if buffer is not None and buffer.is_meta:
                    layer._buffers[name] = None  # a counter that the program does not keep
            if isinstance(layer, nn.RNNBase):
                layer._init_flat_weights()
        return root

    def _module(self, root: nn.Module, path: str) -> nn.Module:
        module, so_far = root, ""
        for part in path.split(".") if path else ():
            so_far = f"{so_far}.{part}".lstrip(".")
            child = module._modules.get(part)
            if child is None:
                child = self._make(so_far)
                module.add_module(part, child)
            module = child
        return module

    def _make(self, path: str) -> nn.Module:
        if path not in self._layers:
            return Holder()
        try:
            with torch.device("meta"):
                return self._layers[path].make()
        except Exception as failure:  # torch checks arguments with asserts, ValueErrors and RuntimeErrors alike
            raise ModelRejected(f"The program's layer {path!r} cannot be built: {first_line(failure)}") from failure

    def _mark_matrices(self, root: nn.Module) -> None:
        for node in self._graph.nodes:
            for name in _matrices(node):
                path, _, attribute = name.rpartition(".")
                holder = root.get_submodule(path)
                # Not at the very root, which is the graph itself.
                if path and isinstance(holder, Holder) and self._tensors[name].ndim > 1:
                    holder.matrices = tuple(dict.fromkeys((*holder.matrices, attribute)))


def _attach(module: nn.Module, name: str, tensor: Tensor, persistent: bool) -> None:
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module._buffers.pop(name, None)
        module.register_buffer(name, tensor, persistent=persistent)


def _parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    for count in range(1, len(parts)):
        yield ".".join(parts[:count])


def _refuse_leftover(node: fx.Node) -> None:
    """What depends on the mode and became no layer would compute in eval as in training, or the other way round."""
    name = operator_name(node).rstrip("_")
    given = arguments(node) if name else {}
    dropout = given.get("dropout_p", given.get("dropout", 0))
    if name in _DROPOUTS or not is_plain(dropout) or dropout:
        raise ModelRejected(f"The program's {node.target} drops out in a way that cannot be told from its graph.")
    if given.get("running_mean") is not None:
        raise ModelRejected(
            f"The program's {node.target} normalizes by statistics that are no buffers beside its weights."
        )


def _matrices(node: fx.Node) -> Iterator[str]:
    """The names of the weights that a product takes, directly or as a view."""
    name = operator_name(node)
    given = arguments(node) if name in _MATRICES else {}
    for argument in _MATRICES.get(name, ()):
        values = given.get(argument)
        for value in values if isinstance(values, list | tuple) else (values,):
            source = _source(value)
            if source is not None:
                yield source


def _source(value: Any) -> str | None:
    for _ in range(MAX_HOPS):
        if not isinstance(value, fx.Node):
            return None
        if value.op == "get_attr":
            return str(value.target)
        if operator_name(value) not in _VIEWS and value.target is not operator.getitem:
            return None
        value = value.args[0] if value.args else None
    return None
