"""Where ways of a network meet that have parted before, and which of them may go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from app.contract.rewiring import What
from worker.data.batch import Inputs
from worker.structure.blocks import same
from worker.structure.connections.cutting import Cut, cut, only_for
from worker.structure.graphs import Graph
from worker.structure.literals import kind_of

_SUMS = frozenset({"add", "iadd", "add_"})
_PRODUCTS = frozenset({"mul", "imul", "mul_", "multiply"})


@dataclass(frozen=True)
class Connection:
    """A way that may go: what one operand of the node `join` needs alone.

    `layers` are those of its weights, of a skip those that it leads around; the last names it. `gone` are the nodes
    that go with it.
    """

    name: str
    join: str
    side: int
    layers: tuple[str, ...]
    gone: frozenset[str]

    @property
    def cut(self) -> Cut:
        return self.join, self.side


@dataclass(frozen=True)
class Connections:
    """Those that may go, in the network's order; of others, by name, why they may not."""

    found: list[Connection]
    kept: dict[str, str]


def connections(graph: Graph, inputs: Inputs, what: What) -> Connections:
    """By one pass: ways that part from one activation and meet in a sum, or in a product.

    What stays has to have the shape that both give together. Raises what the network raises.
    """
    found = _Joins(graph, inputs, what).found()
    counted = Counter(one.name for one in found.found)
    seen: Counter[str] = Counter()
    named = []
    for one in found.found:
        named.append(replace(one, name=f"{one.name}/{seen[one.name]}") if counted[one.name] > 1 else one)
        seen[one.name] += 1  # of layers that compute more than once
    return Connections(named, found.kept)


def standing(graph: Graph, batches: Sequence[Inputs], found: Connections) -> Connections:
    """Those without which the network runs, and computes what it does where they give nothing. Each is tried, on
    batches of different sizes."""
    left = Connections([], dict(found.kept))
    for one in found.found:
        if (trouble := _trouble(graph.module, batches, one)) is None:
            left.found.append(one)
        else:
            left.kept[one.name] = trouble
    return left


def neutral(module: fx.GraphModule, gone: Sequence[Connection], inputs: Inputs) -> Tensor:
    """What the network gives, itself as it is, where these connections give nothing: zeros where they are added, ones
    where they are factors."""
    with torch.no_grad():
        output: Tensor = _Neutral(module, {one.join: one.side for one in gone}).run(*inputs)
    return output


def watched(
    module: fx.GraphModule, seen: Sequence[Connection], inputs: Inputs
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """What the network gives; and, for each connection, what would stay at its place and what is there with it. The
    latter are part of the way to the output, so that gradients come to them."""
    running = _Watching(module, {one.join for one in seen})
    output: Tensor = running.run(*inputs)
    return output, {one.name: running.at(one) for one in seen}


def _trouble(module: fx.GraphModule, batches: Sequence[Inputs], one: Connection) -> str | None:
    graph = cut(module.graph, [one.cut])
    for inputs in batches:
        wanted = neutral(module, [one], inputs)
        try:
            with torch.no_grad():
                output = fx.Interpreter(module, graph=graph).run(*inputs)
        except Exception as error:  # operators raise errors of every class
            return f"without it the network does not run: {str(error).splitlines()[0][:200] if str(error) else error!r}"
        if not same(output, wanted):
            return "the network computes something else without it than where it gives nothing"
    return None


class _Joins:
    """One look at a graph."""

    def __init__(self, graph: Graph, inputs: Inputs, what: What) -> None:
        self._graph, self._what = graph, what
        with torch.no_grad():
            shapes = _Shapes(graph.module)
            shapes.run(*inputs)
        self._seen, self._activations = shapes.seen, shapes.activations
        self._bits: dict[fx.Node, int] = {}
        self._before = self._ancestors()

    def found(self) -> Connections:
        found = Connections([], {})
        for join in self._joins():
            own, why = self._of(join)
            found.found.extend(own)
            if why is not None:
                found.kept[join.name] = why
        return found

    def _joins(self) -> Iterator[fx.Node]:
        """Sums or products of two activations that have one in common."""
        kinds = _PRODUCTS if self._what == "gates" else _SUMS
        for node in self._graph.module.graph.nodes:
            if node.op != "call_function" or kind_of(node) not in kinds or node.kwargs.get("alpha", 1) != 1:
                continue
            if len(operands := _operands(node)) == 2 and node in self._seen:
                first, second = operands
                if first is not second and self._before.get(first, 0) & self._before.get(second, 0):
                    yield node

    def _of(self, join: fx.Node) -> tuple[list[Connection], str | None]:
        """What may go of the two, or why none may."""
        ways, operands = self._graph.ways, _operands(join)
        found, why = [], None
        alone = [only_for(join, side) for side in (0, 1)]
        layers = [self._layers(own) for own in alone]
        for side in (0, 1):
            shown = layers[1 - side] if self._what == "skips" else layers[side]
            if not shown or (self._what == "skips" and layers[side]):
                continue
            if ways is not None and (join.name, side) not in ways:
                continue
            if self._what == "gates" and not self._mixes(shown):
                continue  # the deviation that a norm divides by
            if self._seen[operands[1 - side]] != self._seen[join]:
                gives, stays = (list(self._seen[own][0]) for own in (join, operands[1 - side]))
                why = f"without {shown[-1]} {stays} would stay where there is {gives}"
                continue
            gone = frozenset(node.name for node in alone[side]) | {join.name}
            found.append(Connection(shown[-1], join.name, side, shown, gone))
        if not found and not any(layers) and self._whole(join):
            why = self._shared(join)
        return found, None if found else why

    def _whole(self, join: fx.Node) -> bool:
        return all(self._seen[one] == self._seen[join] for one in _operands(join))

    def _shared(self, join: fx.Node) -> str | None:
        """Of a sum of which nothing has weights of its own."""
        first, second = (self._before[one] for one in _operands(join))
        for own, other in ((first, second), (second, first)):
            if layers := self._layers({node for node, bit in self._bits.items() if bit & own & ~other}):
                return f"what {layers[-1]} gives is read elsewhere too"
        return None  # arithmetic, such as turning queries by their places

    def _layers(self, nodes: set[fx.Node]) -> tuple[str, ...]:
        """Those whose weights the nodes read, in the graph's order."""
        found = [layer for node in self._graph.module.graph.nodes if node in nodes for layer in self._read(node)]
        return tuple(dict.fromkeys(reversed(found)))[::-1]

    def _mixes(self, layers: Sequence[str]) -> bool:
        """Whether some weight is a matrix or a kernel."""
        module = self._graph.module
        weights = [own for layer in layers for own in module.get_submodule(layer).parameters()]
        return any(sum(size > 1 for size in own.shape) > 1 for own in weights)

    def _read(self, node: fx.Node) -> Iterator[str]:
        module = self._graph.module
        if node.op == "call_module":
            name = str(node.target)
            if next(module.get_submodule(name).parameters(), None) is not None:
                yield name
        for one in node.all_input_nodes:
            path, _, own = str(one.target).rpartition(".")
            if one.op == "get_attr" and own in module.get_submodule(path)._parameters:
                yield path or own

    def _ancestors(self) -> dict[fx.Node, int]:
        """Of each activation in floats, as bits, those that it is computed from, itself among them. Sizes and what is
        looked up by whole numbers is no way for an activation."""
        found: dict[fx.Node, int] = {}
        for place, node in enumerate(self._graph.module.graph.nodes):
            if node not in self._activations or node.op == "get_attr":
                continue
            bits = self._bits[node] = 1 << place
            for one in node.all_input_nodes:
                bits |= found.get(one, 0)
            found[node] = bits
        return found


def _operands(join: fx.Node) -> list[fx.Node]:
    """The two, where both are computed."""
    return [one for one in join.args[:2] if isinstance(one, fx.Node)]


class _Shapes(fx.Interpreter):
    """What each node gives: shape and dtype of a tensor, and whether it is floats, or holds some."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, tuple[tuple[int, ...], torch.dtype]] = {}
        self.activations: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        given = super().run_node(n)
        if isinstance(given, Tensor):
            self.seen[n] = tuple(given.shape), given.dtype
        parts = given if isinstance(given, list | tuple) else [given]
        if any(isinstance(one, Tensor) and one.is_floating_point() for one in parts):
            self.activations.add(n)
        return given


class _Neutral(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, sides: Mapping[str, int]) -> None:
        super().__init__(module)
        self._sides = sides

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self._sides:
            return super().run_node(n)
        side = self._sides[n.name]
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        nothing = torch.ones_like if kind_of(n) in _PRODUCTS else torch.zeros_like
        given = [nothing(own) if place == side else own for place, own in enumerate(args)]
        return self.call_function(n.target, tuple(given), kwargs)


class _Watching(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, joins: set[str]) -> None:
        super().__init__(module)
        self._joins = joins
        self._operands: dict[str, list[Tensor]] = {}
        self._given: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self._joins:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        self._operands[n.name] = [own.detach().clone() for own in args[:2]]  # what follows may write into them
        self._given[n.name] = super().run_node(n)
        return self._given[n.name].clone()

    def at(self, one: Connection) -> tuple[Tensor, Tensor]:
        return self._operands[one.join][1 - one.side], self._given[one.join]
