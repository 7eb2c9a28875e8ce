"""Resizing by connections: ways through the network go, those that do the least."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor, fx, nn

from app.contract.errors import InvalidSpec, Unsupported
from app.contract.rewiring import Rewire
from worker.constraints import baked
from worker.context import Context
from worker.data.batch import Inputs
from worker.model import Model
from worker.structure.blocks import passed, same, varied
from worker.structure.calls import example_on
from worker.structure.connections.cutting import CUT, cut, without
from worker.structure.connections.joins import Connection, Connections, connections, neutral, standing, watched
from worker.structure.edits import Edit, apply
from worker.structure.graphs import Graph, graph_of
from worker.structure.patterns import matches
from worker.structure.restructured import take
from worker.techniques.base import Details
from worker.techniques.structure.influence import in_order
from worker.techniques.structure.leaving import Choice, shown, so_many, told, within
from worker.techniques.structure.limits import had, limit_of, measured, remaining

OTHER_BATCH = 3  # beside that of two samples that networks are looked at with
NONE = {
    "branches": "The network has no sum of two ways from one place of which one has weights of its own and could go.",
    "skips": "The network has no sum of a way without weights and one with weights around which it leads.",
    "gates": "The network has no factor with weights of its own, made of what it is multiplied with.",
}


def applies(step: Rewire, model: Model) -> str | None:
    """A network needs ways that part and meet. Raises InvalidSpec where `exclude` matches none, or leaves none.

    What is code is looked at when its turn has come: a program has to be made of it.
    """
    if not isinstance(model.module, fx.GraphModule | nn.Sequential):
        return None
    found = connections(graph_of(model), varied(model), step.what)
    if not found.found:
        return _none(step, found)
    included(step, found.found)
    return None


def rewired(step: Rewire, context: Context) -> Details:
    """Chooses connections and takes them out, the same in all processes. Raises Unsupported where none may go,
    InvalidSpec where too few may."""
    model = context.model
    before = had(model)
    graph, batches = graph_of(model), batches_of(model)
    found = standing(graph, batches, connections(graph, batches[0], step.what))
    if not found.found:
        raise Unsupported(_none(step, found))
    parts = OfConnections(graph.module, included(step, found.found))
    looking = replace(context, model=replace(model, module=graph.module))
    choice = context.ranks.told(lambda: _chosen(step, looking, parts))
    by_name = {one.name: one for one in parts.free}
    gone = [by_name[name] for name in choice.gone]
    edits = edits_of(graph, gone)
    module = baked(graph.module if graph.ways is None else model.module)
    apply(module, edits)
    _check(graph, batches[0], module, gone)
    take(context, module, edits)
    context.ranks.alike(parameter.data for parameter in context.model.module.parameters())
    details: Details = {
        "method": step.method, "what": step.what, "criterion": step.criterion, "connections_before": len(found.found),
        "cut_connections": len(gone),
    }  # fmt: skip
    return details | remaining(before, context.model) | told(found.found, found.kept, choice, "connections", "cut")


def batches_of(model: Model) -> list[Inputs]:
    """Inputs of two sizes that a network is tried with."""
    return [varied(model), example_on(model.module, model, OTHER_BATCH)]


def included(step: Rewire, found: Sequence[Connection]) -> list[Connection]:
    """Those that no pattern keeps. Raises InvalidSpec for one that matches none, and where none is left."""
    for pattern in step.exclude:
        if not any(_matches(one, pattern) for one in found):
            raise InvalidSpec(f"exclude: {pattern!r} matches no connection. There are {shown(found)}.")
    left = [one for one in found if not any(_matches(one, pattern) for pattern in step.exclude)]
    if not left:
        raise InvalidSpec(f"exclude leaves none of the connections {shown(found)}. Give fewer patterns.")
    return left


def _matches(one: Connection, pattern: str) -> bool:
    """Whether the pattern is for the connection, for a layer in it, or for what such a layer lies in."""
    return any(matches(pattern, name) for name in (one.name, *one.layers))


def edits_of(graph: Graph, gone: Sequence[Connection]) -> list[Edit]:
    """What is told of it. Of an architecture from the inside out, and the last branch first: what others are called
    stays so."""
    if graph.ways is None:
        return [{"kind": CUT, "join": one.join, "side": one.side} for one in gone]
    ways = [graph.ways[one.cut] for one in gone]
    ways.sort(key=lambda own: (own[0].count("."), own[1] if isinstance(own[1], int) else 0), reverse=True)
    return [{"kind": CUT, "join": path, "side": way} for path, way in ways]


class OfConnections:
    """Connections as parts of a graph: without one, what it meets goes on alone."""

    def __init__(self, module: fx.GraphModule, free: Sequence[Connection]) -> None:
        self._module, self.free = module, free

    def may_go(self, one: Connection, gone: Sequence[Connection]) -> bool:
        """Whether the place where it meets another is still there, and the other."""
        return not any(one.join in other.gone for other in gone)

    def without(self, gone: Sequence[Connection]) -> AbstractContextManager[None]:
        """They are cut."""
        return without(self._module, [one.cut for one in gone])

    def watched(self, inputs: Inputs) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """What the graph gives, and what is at each place without and with the connection."""
        return watched(self._module, self.free, inputs)

    def share(self, measure: str, model: Model, gone: Sequence[Connection]) -> int:
        """How much of a measure of the model goes with them."""
        own = self._module
        left = fx.GraphModule(own, cut(own.graph, [one.cut for one in gone]))
        # Of modules that hold what their graphs read, and nothing else.
        return measured(measure, model, fx.GraphModule(own, own.graph)) - measured(measure, model, left)


def _chosen(step: Rewire, context: Context, parts: OfConnections) -> Choice:
    """Raises InvalidSpec, with what is reachable, where too few may go."""
    model = context.model
    order = in_order(step, context, parts)
    if step.budget is None:
        assert step.connections is not None
        return so_many(step.connections, order, "connections")
    limit = limit_of(step.budget, model)
    return within(limit, order, lambda gone: limit.whole - parts.share(limit.measure, model, gone), "connections")


def _check(graph: Graph, inputs: Inputs, module: nn.Module, gone: Sequence[Connection]) -> None:
    """Each was tried alone. Raises Unsupported where the network is another one without all."""
    if not same(passed(module, inputs), neutral(graph.module, gone, inputs)):
        raise Unsupported(
            f"Without {shown(gone)} together the network computes something else than where they give nothing. Exclude "
            "some, or ask for fewer."
        )


def _none(step: Rewire, found: Connections) -> str:
    return NONE[step.what] + "".join(f" {name}: {why}." for name, why in list(found.kept.items())[:3])
