"""A network without some of the ways that meet in it: a graph in which what they met goes on alone."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from worker.loading.program_module import Holder
from worker.structure.connections.rewording import without_way

CUT = "cut"
Cut = tuple[str, int]
"""A node with two operands, by name, and which of the two goes."""
_STAY = ("placeholder", "output")  # also those that nothing reads: they are how a graph is called


def apply_cut(module: nn.Module, edit: Mapping[str, Any]) -> None:
    """Takes a way out, and the weights that nothing else reads: of a graph by the name of the node where it meets
    another, of an architecture by that of the layer. Raises KeyError, AttributeError or IndexError for one that there
    is not."""
    if not isinstance(module, fx.GraphModule):
        without_way(module, edit["join"], edit["side"])
        return
    before = _used(module.graph)
    module.graph = cut(module.graph, [(edit["join"], edit["side"])])
    _drop(module, before - _used(module.graph), _used(module.graph))


def cut(graph: fx.Graph, cuts: Sequence[Cut]) -> fx.Graph:
    """A copy without these, one after the other, and without what only they read. Nodes keep their names; a cut of what
    went with an earlier one is left out. Raises KeyError for a node that there never was."""
    left = copy.deepcopy(graph)
    nodes = {node.name: node for node in left.nodes}
    gone: set[fx.Node] = set()
    for name, side in cuts:
        join = nodes[name]
        if join in gone:
            continue
        stays = join.args[1 - side]
        assert isinstance(stays, fx.Node)
        join.replace_all_uses_with(stays)
        gone |= set(_erased(left, join))
    return left


@contextmanager
def without(module: fx.GraphModule, cuts: Sequence[Cut]) -> Iterator[None]:
    """Meanwhile the module computes without them."""
    own = module.graph
    module.graph = cut(own, cuts)
    try:
        yield
    finally:
        module.graph = own


def only_for(join: fx.Node, side: int) -> set[fx.Node]:
    """The nodes that nothing but this operand of the join needs, with those that give weights."""
    goes, stays = join.args[side], join.args[1 - side]
    assert isinstance(goes, fx.Node)
    found: set[fx.Node] = set()
    pending = [goes]
    while pending:
        node = pending.pop()
        if node in found or node is stays or node.op in _STAY or any(_needs(one, join, found) for one in node.users):
            continue
        found.add(node)
        pending.extend(node.all_input_nodes)
    return found


def _needs(user: fx.Node, join: fx.Node, gone: Collection[fx.Node]) -> bool:
    return user is not join and user not in gone


def _erased(graph: fx.Graph, node: fx.Node) -> Iterator[fx.Node]:
    """From a node on which nothing reads backwards. Not fx's own elimination: what writes in place would stay, and what
    nothing reads from the beginning, which may be there for a reason, would not."""
    pending = [node]
    gone: set[fx.Node] = set()
    while pending:
        own = pending.pop()
        if own in gone or own.users or own.op in _STAY:
            continue
        inputs = list(own.all_input_nodes)
        graph.erase_node(own)
        gone.add(own)
        yield own
        pending.extend(inputs)


Used = set[tuple[str, str]]
"""Layers that a graph calls and tensors that it reads: the kind of node, and the name."""


def _used(graph: fx.Graph) -> Used:
    return {(node.op, str(node.target)) for node in graph.nodes if node.op in ("call_module", "get_attr")}


def _drop(module: nn.Module, gone: Used, left: Used) -> None:
    """Takes what is no longer used out of the tree, and what would be empty without it."""
    read = {name for _, name in left}
    for op, name in sorted(gone):  # layers first
        path, _, own = name.rpartition(".")
        if ("call_module", path) in gone:
            continue  # a weight of a layer that has gone
        holder = module.get_submodule(path)
        if op == "call_module" and not any(one == name or one.startswith(f"{name}.") for one in read):
            holder._modules.pop(own)
        elif op == "get_attr" and not any(kind == "call_module" and path == one for kind, one in left):
            holder._parameters.pop(own, None)
            holder._buffers.pop(own, None)
            holder._non_persistent_buffers_set.discard(own)
            if isinstance(holder, Holder):
                holder.matrices = tuple(one for one in holder.matrices if one != own)
        _prune(module, path, read)


def _prune(module: nn.Module, path: str, read: Collection[str]) -> None:
    """Upwards from a module that has lost something."""
    while path and path not in read:
        own = module.get_submodule(path)
        if own._parameters or own._buffers or own._modules:
            return
        path, _, name = path.rpartition(".")
        module.get_submodule(path)._modules.pop(name)
