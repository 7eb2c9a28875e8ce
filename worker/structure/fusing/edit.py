"""Parts of a network that leave it while it computes the same: in words, and with the values that belong to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from worker.structure.calls import device_of
from worker.structure.fusing.fold_math import Affine, affine, before, behind

FUSE = "fuse"
BEHIND, BEFORE = "behind", "before"
REPLACE, READ, CONSTANT = "replace", "read", "constant"

Change = dict[str, Any]
"""Of a graph, by names of nodes: `replace` a `node` `by` another, let it `read` another first, or make it a `constant`
of a shape and dtype under a name."""
Removed = dict[str, Any]
"""The edit; JSON values."""


def fused(
    *,
    folds: Sequence[Mapping[str, str]] = (),
    identities: Sequence[str] = (),
    graph: Sequence[Change] = (),
    gone: Sequence[str] = (),
) -> Removed:
    """`folds`: a `norm` that goes into a `layer`, which lies `behind` it or `before` (`way`: of the norm). `identities`
    are modules that give what comes in from now on, `graph` changes of a graph, `gone` modules and tensors that nothing
    names any more."""
    return {
        "kind": FUSE, "folds": [dict(one) for one in folds], "identities": list(identities),
        "graph": [dict(one) for one in graph], "gone": list(gone),
    }  # fmt: skip


def apply_fuse(module: nn.Module, edit: Mapping[str, Any]) -> None:
    """Gives the module that shape; biases that are new, and constants, are zeros. Raises AttributeError or KeyError for
    what there is not."""
    for fold in edit["folds"]:
        _give_bias(module.get_submodule(fold["layer"]))
    for name in edit["identities"]:
        module.set_submodule(name, nn.Identity())
    if edit["graph"]:
        _change(module, edit["graph"])
    for name in edit["gone"]:
        _remove(module, name)


def enact(module: nn.Module, edit: Mapping[str, Any]) -> None:
    """Applies an edit, with the values that let the module compute what it did."""
    with torch.no_grad():
        for fold in edit["folds"]:
            _fold(module.get_submodule(fold["layer"]), module.get_submodule(fold["norm"]), fold["way"])
        known = _Known(module) if edit["graph"] else None
        values = {
            one["name"]: known.of(one["node"]).clone(memory_format=torch.contiguous_format)
            for one in edit["graph"]
            if known is not None and one["do"] == CONSTANT
        }
        apply_fuse(module, edit)
        for name, value in values.items():
            module.get_buffer(name).copy_(value)


def affine_of(norm: Any) -> Affine:
    """What a batch norm of torch does in eval mode."""
    return affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def _fold(layer: Any, norm: nn.Module, way: str) -> None:
    own, groups = affine_of(norm), getattr(layer, "groups", 1)
    if way == BEHIND:
        transposed = isinstance(layer, _ConvTransposeNd)
        weight, bias = behind(layer.weight, layer.bias, own, groups, transposed=transposed)
    else:
        weight, bias = before(layer.weight, layer.bias, own, groups)
    _give_bias(layer)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


def _give_bias(layer: Any) -> None:
    if layer.bias is None:
        size = layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features
        layer.bias = nn.Parameter(layer.weight.new_zeros(size))


def _change(module: nn.Module, changes: Sequence[Change]) -> None:
    assert isinstance(module, fx.GraphModule)
    nodes = {node.name: node for node in module.graph.nodes}
    for one in changes:
        node = nodes[one["node"]]
        if one["do"] == REPLACE:
            node.replace_all_uses_with(nodes[one["by"]])
        elif one["do"] == READ:
            node.args = (nodes[one["by"]], *node.args[1:])
        else:
            value = torch.zeros(one["shape"], dtype=getattr(torch, one["dtype"]), device=device_of(module))
            module.register_buffer(one["name"], value)
            with module.graph.inserting_before(node):
                made = module.graph.get_attr(one["name"])
            node.replace_all_uses_with(made)
    module.graph.eliminate_dead_code()
    module.recompile()


def _remove(module: nn.Module, name: str) -> None:
    path, _, own = name.rpartition(".")
    holder = module.get_submodule(path)
    for entries in (holder._modules, holder._parameters, holder._buffers):
        if own in entries:
            del entries[own]
            return
    raise AttributeError(f"there is no {name}")


class _Known:
    """Values of a graph that hang on no input."""

    def __init__(self, module: nn.Module) -> None:
        assert isinstance(module, fx.GraphModule)
        self._module = module
        self._nodes = {node.name: node for node in module.graph.nodes}
        self._found: dict[fx.Node, Any] = {}

    def of(self, name: str) -> Tensor:
        value = known_value(self._module, self._nodes[name], self._found)
        assert isinstance(value, Tensor)
        return value


def known_value(module: fx.GraphModule, node: fx.Node, found: dict[fx.Node, Any]) -> Any:
    """What a node gives whatever comes in; `found` is what is known by then, and is added to. The device of an input is
    that of the module."""
    if node not in found:
        if node.target is getattr and node.args[1] == "device":
            found[node] = device_of(module)
        elif node.op == "get_attr":
            path, _, own = str(node.target).rpartition(".")
            found[node] = getattr(module.get_submodule(path), own)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: known_value(module, one, found))
            assert callable(node.target)
            found[node] = node.target(*args, **kwargs)
    return found[node]
