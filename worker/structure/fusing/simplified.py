"""What a graph computes for nothing, as changes of it (`fusing.edit`): operators without effect, the same operator
on the same values twice, and operators on constants."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from worker.structure.fusing.edit import CONSTANT, READ, REPLACE, Change, known_value
from worker.structure.fusing.graph_runs import Runs
from worker.structure.fusing.purity import is_pure, mutated
from worker.structure.literals import kind_of

_ORDERED = frozenset({"view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "expand"})
_RESHAPES = frozenset({"view", "reshape", "_unsafe_view"})  # what they give hangs on the elements and their sizes alone
_COPIES = frozenset({"clone", "contiguous", "alias", "identity", "lift_fresh", "lift_fresh_copy", "to", "_to_copy"})
_CASTS = frozenset({"cast_to", "cast_like", "type_as", "float"})
_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1, "true_divide": 1}  # as the second operand
_EITHER = frozenset({"add", "mul"})  # as the first one too
_IN_TRAINING = frozenset({"Dropout", "FeatureDropout", "detach", "dropout"})
# A node in a program's file, with what it notes of shapes, takes about as much.
NODE_BYTES = 1024


def identities(module: fx.GraphModule, runs: Runs, *, for_inference: bool) -> list[Change]:
    """Operators that give what comes in, transpositions that cancel, and reshapes of reshapes."""
    apart, changes = mutated(module), list[Change]()
    for node in module.graph.nodes:
        source = _source(node)
        if source is None or node in apart or source in apart:
            continue
        if (by := _unchanged(module, node, source, runs, for_inference)) is not None:
            changes.append({"do": REPLACE, "node": node.name, "by": by.name})
        elif (by := _under(node, source, runs)) is not None and by not in apart:
            changes.append({"do": READ, "node": node.name, "by": by.name})
    return _apart(changes)


def _apart(changes: list[Change]) -> list[Change]:
    """Without those about nodes that another takes away; what they could do is done in another round."""
    gone: set[str] = set()
    left = []
    for one in changes:
        if one["by"] not in gone and one["node"] not in gone:
            left.append(one)
            gone.add(one["node"])
    return left


def common(module: fx.GraphModule) -> list[Change]:
    """Equal operators on equal values: all but the first give way."""
    apart, first, same, changes = mutated(module), dict[Any, fx.Node](), dict[fx.Node, fx.Node](), list[Change]()
    for node in module.graph.nodes:
        if node in apart or not is_pure(module, node):
            continue
        key = (node.op, node.target, *(_key(own, same) for own in (node.args, node.kwargs)))
        other = first.setdefault(key, node)
        if other is not node:
            same[node] = other
            changes.append({"do": REPLACE, "node": node.name, "by": other.name})
    return changes


def _key(value: Any, same: dict[fx.Node, fx.Node]) -> Any:
    """Equal for equal arguments; 1, 1.0 and True are not."""
    if isinstance(value, fx.Node):
        return same.get(value, value)
    if isinstance(value, dict):
        return tuple((name, _key(own, same)) for name, own in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(_key(own, same) for own in value)
    return type(value).__name__, repr(value)


def constants(module: fx.GraphModule, first: int) -> list[Change]:
    """What is computed of buffers and numbers alone, where it takes no more bytes than what goes; numbered from `first`
    on."""
    apart, found = mutated(module), dict[fx.Node, Any]()
    known = [node for node in module.graph.nodes if node not in apart and _is_known(module, node, found)]
    settled: set[fx.Node] = set()  # stored, or read by nothing but what is
    changes: list[Change] = []
    for node in reversed(known):
        value = found[node]
        if all(user in settled for user in node.users):
            settled.add(node)
        elif node.op == "call_function" and isinstance(value, Tensor) and _pays(node, value, found):
            settled.add(node)
            shape, dtype = list(value.shape), str(value.dtype).removeprefix("torch.")
            name = f"fused_{first + len(changes)}"
            changes.append({"do": CONSTANT, "node": node.name, "name": name, "shape": shape, "dtype": dtype})
    return changes


def _is_known(module: fx.GraphModule, node: fx.Node, found: dict[fx.Node, Any]) -> bool:
    """Notes what a node gives where that hangs on no input and no weight that may be trained."""
    is_device = node.target is getattr and node.args[1] == "device"
    if not is_device and node.op == "call_function":
        needed = node.all_input_nodes
        if not is_pure(module, node) or any(one not in found for one in needed) or node.target is getattr:
            return False
    elif not is_device and node.op != "get_attr":
        return False
    try:
        with torch.no_grad():
            value = known_value(module, node, found)
    except Exception:  # operators raise errors of every class
        return False
    if isinstance(value, nn.Parameter):
        del found[node]
        return False
    return True


def _pays(node: fx.Node, value: Tensor, found: dict[fx.Node, Any]) -> bool:
    """Whether storing a value takes no more than what it is computed of and its operators."""
    behind, pending = {node}, [node]
    while pending:
        for one in pending.pop().all_input_nodes:
            if one not in behind and all(user in behind for user in one.users):
                behind.add(one)
                pending.append(one)
    held = [found[one] for one in behind if one.op == "get_attr"]
    operators = sum(one.op == "call_function" for one in behind)
    return value.nbytes <= NODE_BYTES * operators + sum(own.nbytes for own in held if isinstance(own, Tensor))


def _source(node: fx.Node) -> fx.Node | None:
    """The tensor that an operator works on."""
    if node.op not in ("call_function", "call_module") or not node.args:
        return None
    first = node.args[0]
    if isinstance(first, fx.Node):
        return first
    second = node.args[1] if len(node.args) > 1 else None
    return second if kind_of(node) in _EITHER and isinstance(second, fx.Node) else None


def _unchanged(
    module: fx.GraphModule, node: fx.Node, source: fx.Node, runs: Runs, for_inference: bool
) -> fx.Node | None:
    """What the node can be replaced by: what comes into it, or into the transposition in front of it."""
    kind = kind_of(node) if node.op == "call_function" else type(module.get_submodule(str(node.target))).__name__
    if kind in _IN_TRAINING:
        return source if for_inference else None
    if kind == "Identity":
        return source
    if kind in _COPIES or kind in _CASTS:
        return source if runs.same_layout(node, source) else None
    if kind in _ORDERED:
        return source if runs.same_shape(node, source) else None
    if kind == "slice":
        return source if runs.same_layout(node, source) and _is_whole(node) else None
    if kind in _NEUTRAL:
        return _neutral(module, node, kind, runs)
    return _cancelled(node, source, runs)


_NO_END = 1 << 31


def _is_whole(node: fx.Node) -> bool:
    """Of x.slice(dim, start, end, step): all of it, however long it is."""
    start, end, step = (*node.args, *(None,) * 5)[2:5]
    return start in (None, 0) and (end is None or (isinstance(end, int) and end >= _NO_END)) and step in (None, 1)


def _neutral(module: fx.GraphModule, node: fx.Node, kind: str, runs: Runs) -> fx.Node | None:
    if node.kwargs.get("rounding_mode") is not None or len(node.args) < 2:
        return None
    pairs = [(node.args[0], node.args[1])] + ([(node.args[1], node.args[0])] if kind in _EITHER else [])
    for own, other in pairs:
        if isinstance(own, fx.Node) and _number(module, other) == _NEUTRAL[kind] and runs.same_shape(node, own):
            return own
    return None


def _number(module: fx.GraphModule, value: Any) -> float | None:
    """A number that is written down, or in a buffer of its own."""
    if isinstance(value, int | float):
        return value
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    held = known_value(module, value, {})
    plain = isinstance(held, Tensor) and not isinstance(held, nn.Parameter) and held.numel() == 1
    return float(held) if plain else None


def _cancelled(node: fx.Node, source: fx.Node, runs: Runs) -> fx.Node | None:
    """Of two transpositions that undo each other what comes into the first; of one that moves nothing what comes in."""
    order = _order(node, runs)
    if order is None:
        return None
    if order == sorted(order):
        return source
    before, root = _order(source, runs), _source(source)
    if before is None or root is None or [before[axis] for axis in order] != sorted(order):
        return None
    return root


def _order(node: fx.Node, runs: Runs) -> list[int] | None:
    """Where the dimensions that a transposition gives come from."""
    shape = runs.of(node)[0].shape if node.op == "call_function" else None
    rule = _ORDERS.get(kind_of(node))
    if shape is None or rule is None:
        return None
    try:
        return [axis % len(shape) for axis in rule(node, len(shape))]
    except (TypeError, IndexError):  # computed, or given by name
        return None


def _swapped(node: fx.Node, axes: int) -> list[int]:
    order = list(range(axes))
    axes_given: Any = node.args[1:3]
    one, other = map(operator.index, axes_given)
    order[one], order[other] = order[other], order[one]
    return order


def _turned(node: fx.Node, axes: int) -> list[int]:
    return list(reversed(range(axes)))


def _transposed(node: fx.Node, axes: int) -> list[int]:
    """torch's takes two dimensions, that of an ONNX graph all of them, or none for turned round."""
    if "order" in node.kwargs:
        order: Any = node.kwargs["order"]
        return list(order) if order is not None else _turned(node, axes)
    return _swapped(node, axes)


_ORDERS: dict[str, Callable[[fx.Node, int], list[int]]] = {
    "permute": lambda node, axes: [operator.index(axis) for axis in node.args[1]],  # type: ignore[union-attr, arg-type]
    "transpose": _transposed,
    "t": _turned,
    "numpy_T": _turned,
}


def _under(node: fx.Node, source: fx.Node, runs: Runs) -> fx.Node | None:
    """What a reshape of a reshape may read instead."""
    root = _source(source)
    if root is None or len(source.users) > 1 or kind_of(node) not in _RESHAPES:
        return None
    if kind_of(source) not in _ORDERED - {"expand"} or node.target is not _ATEN.get(kind_of(node)):
        return None
    lies = all(own.contiguous for own in runs.of(root))
    return root if lies and all(own.shape is not None for own in runs.of(root)) else None


# By its full name: what an ONNX graph calls so keeps sizes of what comes in where it says 0.
_ATEN: dict[str, Any] = {name: getattr(torch.ops.aten, name).default for name in _RESHAPES}


def nodes_by_kind(module: fx.GraphModule) -> Iterator[str]:
    """Of operators and layers."""
    for node in module.graph.nodes:
        if node.op == "call_function":
            yield kind_of(node)
        elif node.op == "call_module":
            yield type(module.get_submodule(str(node.target))).__name__
