"""Numbers in the code of a graph that count channels: sizes that a view gives, or that something is split into."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from worker.structure.tracing.tracer import Tracer

_VIEWS = ("view", "reshape", "_unsafe_view", "_reshape_alias", "expand")
_SPLITS = ("split", "split_with_sizes")

Path = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Literal:
    """A number in the arguments of a node, and the labels of the channels that it counts."""

    node: str
    path: Path
    labels: Tensor


class Reader(fx.Interpreter):
    """Runs a graph within a labelled pass, and reads its numbers."""

    def __init__(self, module: fx.GraphModule, tracer: Tracer) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._tracer = tracer
        self.found: list[Literal] = []

    def run_node(self, n: fx.Node) -> Any:
        """Beside what it gives, which of its arguments are lengths of what carries labels."""
        given = super().run_node(n)
        name = name_of(n)
        if n.op == "call_function" and name in _VIEWS and isinstance(given, Tensor) and len(n.args) > 1:
            self._counted(n, (1,), _lengths(self._tracer, given))
        elif n.op == "call_function" and name in _SPLITS and len(n.args) > 1:
            self._counted(n, (1,), [_labels(self._tracer, part, self._dim(n)) for part in given])
        return given

    def _dim(self, node: fx.Node) -> int:
        dim = node.kwargs.get("axis", node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0))
        assert isinstance(dim, int)
        return dim

    def _counted(self, node: fx.Node, path: Path, lengths: Sequence[Tensor | None]) -> None:
        for place, (own, where) in enumerate(self._numbers(node, path)):
            labels = lengths[place] if place < len(lengths) else None
            if labels is not None and where is not None and own == len(labels):
                self.found.append(Literal(*where, labels))

    def _numbers(self, node: fx.Node, path: Path) -> Iterator[tuple[Any, tuple[str, Path] | None]]:
        """The numbers of an argument in a row, each with where it is written; None of what is computed."""
        value: Any = node.args
        for step in path:
            value = value[step]
        if isinstance(value, int):
            yield value, (node.name, path)
        elif isinstance(value, list | tuple):
            for place in range(len(value)):
                yield from self._numbers(node, (*path, place))
        elif isinstance(value, fx.Node) and value.op == "call_function" and name_of(value) == "concatenate":
            for place in range(len(value.args)):
                yield from self._numbers(value, (place,))
        elif isinstance(value, fx.Node):
            known = self.env.get(value)
            for one in known if isinstance(known, list | tuple) else (known,):
                yield one, None


def rewrite(module: nn.Module, numbers: Mapping[str, Mapping[str, int]]) -> None:
    """Puts other numbers in the arguments of a graph's nodes: by node, by path ("1.0": the first of the second).

    Raises KeyError for a node that there is not.
    """
    if not numbers:
        return
    assert isinstance(module, fx.GraphModule)
    nodes = {node.name: node for node in module.graph.nodes}
    for name, own in numbers.items():
        for path, value in own.items():
            nodes[name].args = _put(nodes[name].args, tuple(map(int, path.split("."))), value)
    module.recompile()


def _put(value: Any, path: Path, number: int) -> Any:
    if not path:
        return number
    changed = list(value)
    changed[path[0]] = _put(changed[path[0]], path[1:], number)
    return tuple(changed) if isinstance(value, tuple) else changed


def name_of(node: fx.Node) -> str:
    """Of a function, or of an operator without the overload."""
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).removeprefix("aten::") if schema is not None else getattr(node.target, "__name__", "")


def _lengths(tracer: Tracer, given: Tensor) -> list[Tensor | None]:
    return [_labels(tracer, given, dim) for dim in range(given.ndim)]


def _labels(tracer: Tracer, given: Any, dim: int) -> Tensor | None:
    """What lies along a dimension, where labels do."""
    carried = tracer.of(given)
    if not isinstance(carried, Tensor) or dim % carried.ndim not in tracer.layout.varying(carried):
        return None
    return tracer.layout.along(carried, dim).clone()
