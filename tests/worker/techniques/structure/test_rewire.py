"""The resize step with method connections: what a connection does is measured, and those that do the least go."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from app.contract.budgets import Budget
from app.contract.errors import InvalidSpec, Unsupported
from app.contract.resizing import Resize
from app.contract.rewiring import Rewire
from tests.worker.helpers import context_for
from tests.worker.structure.nets import network
from tests.worker.structure.support import model_of
from tests.worker.techniques.structure.test_resize import (
    DATA,
    DEPTH,
    context,
    count,
    found,
    memory_double,
    of,
    part_of,
    residual,
    train_inputs,
    trained,
)
from worker.context import Context
from worker.evaluation.macs import module_macs
from worker.structure.blocks import bypassed
from worker.structure.connections.joins import Connection, connections
from worker.structure.graphs import graph_of
from worker.structure.restructured import restructure
from worker.techniques.base import Details
from worker.techniques.pruning.sensitivity import drift
from worker.techniques.structure.influence import OfBlocks, cosines, taylor
from worker.techniques.structure.resize import ResizeTechnique
from worker.techniques.structure.rewire import OfConnections, batches_of

__all__ = ["context", "trained"]
LAST = [f"{place}.layers.2" for place in range(1, DEPTH + 1)]


def rewire(context: Context, **fields: Any) -> Details:
    return ResizeTechnique().apply(Rewire(**fields), context)


def rows(details: Details) -> dict[str, dict[str, Any]]:
    told: Any = details["connections"]
    return {row["name"]: row for row in told}


def gone(details: Details) -> list[str]:
    return [name for name, row in rows(details).items() if row["cut"]]


def ways(context: Context) -> OfConnections:
    graph = graph_of(context.model)
    own = connections(graph, batches_of(context.model)[0], "branches").found
    return OfConnections(graph.module, own)


@pytest.mark.parametrize("looks", [cosines, taylor])
def test_a_branch_does_what_a_block_of_it_alone_does(context: Context, looks: Any) -> None:
    """Whose influence is held against numpy and against slopes elsewhere."""
    blocks, parts = OfBlocks(context.model.module, found(context)), ways(context)
    data = memory_double(part_of(DATA, {"train": 20}))
    context = of(context.model.module.double(), context.scratch, data)
    of_blocks, of_ways = looks(context, blocks, 20), looks(context, parts, 20)
    assert list(of_ways) == LAST
    for place, name in enumerate(LAST, 1):
        assert of_ways[name] == pytest.approx(of_blocks[str(place)], rel=1e-9)


def test_what_is_watched_is_what_is_there_before_anything_writes_into_it(tmp_path: Path) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.way, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Any) -> Any:
            x = x * 1
            x += self.way(x)
            return self.out(x.relu_())

    torch.manual_seed(0)
    module = Writes().eval()
    model = model_of(module, (torch.randn(2, 4),))
    graph = graph_of(model)
    (one,) = connections(graph, batches_of(model)[0], "branches").found
    x = torch.randn(5, 4)
    with torch.no_grad():
        output, seen = OfConnections(graph.module, [one]).watched((x,))
        came, went = seen[one.name]
        assert torch.equal(came, x)
        torch.testing.assert_close(went, x + module.way(x))
        torch.testing.assert_close(output, module.out(went.relu()))
    output, seen = OfConnections(graph.module, [one]).watched((x,))
    (gradient,) = torch.autograd.grad(output.sum(), [seen[one.name][1]])
    torch.testing.assert_close(gradient, module.out.weight.sum(0) * (went > 0))


def test_greedy_takes_each_time_what_moves_the_outputs_least(context: Context) -> None:
    own = {f"{one.name}.layers.2": one for one in found(context)}
    told = drift(context, 50, "")
    expected: list[str] = []
    for _ in range(3):
        moved = {}
        for name in own.keys() - set(expected):
            with bypassed([own[one] for one in (*expected, name)]):
                moved[name] = told()
        expected.append(min(moved, key=lambda name: moved[name]))
    details = rewire(context, connections=3, criterion="greedy", samples=50)
    assert set(gone(details)) == set(expected)
    assert rows(details)[expected[-1]]["influence"] == pytest.approx(moved[expected[-1]], rel=1e-4)


@pytest.mark.parametrize("criterion", ["cosine", "taylor"])
def test_those_of_least_influence_go_and_the_rest_is_as_it_was(context: Context, criterion: str) -> None:
    module = copy.deepcopy(context.model.module)
    blocks = {f"{one.name}.layers.2": one for one in found(of(module, context.scratch))}
    details = rewire(context, connections=2, criterion=criterion, samples=50)
    order = sorted(rows(details), key=lambda name: rows(details)[name]["influence"])
    assert set(gone(details)) == set(order[:2])
    x, _ = train_inputs(DATA)
    with torch.no_grad(), bypassed([blocks[name] for name in gone(details)]):
        wanted = module(x)
    with torch.no_grad():
        assert torch.equal(context.model.module(x), wanted)
    kinds = [type(layer) for layer in context.model.module]
    assert kinds.count(nn.Identity) == 2


@pytest.mark.parametrize("measure", ["parameters", "macs", "bytes"])
@pytest.mark.parametrize("share", [0.9, 0.6])
def test_a_budget_is_met_by_the_fewest_in_order(context: Context, measure: str, share: float) -> None:
    module = copy.deepcopy(context.model.module)
    example = context.model.example(1)
    details = rewire(context, budget=Budget(**{measure: share}), samples=50)
    own = "parameters" if measure == "bytes" else measure
    assert details["parameters"] == count(context.model.module)
    assert details["macs"] == module_macs(context.model.module, example)
    assert details[f"{own}_share"] <= share  # type: ignore[operator]
    order = sorted(rows(details), key=lambda name: rows(details)[name]["influence"])
    chosen = order[: len(gone(details))]
    assert set(gone(details)) == set(chosen)
    for name in chosen[:-1]:
        module[int(name.split(".")[0])] = nn.Identity()
    before, after = (copy.deepcopy(one) for one in (context.uploaded.module, module))
    if own == "parameters":
        assert count(after) > share * count(before)
    else:
        assert module_macs(after, example) > share * module_macs(before, example)


def test_too_few_say_what_could_be(context: Context) -> None:
    with pytest.raises(InvalidSpec, match=r"all 4 connections that may go .* of the parameters are left"):
        rewire(context, budget=Budget(parameters=0.1), samples=20)
    with pytest.raises(InvalidSpec, match="4 connections may go, and 5 are asked for"):
        rewire(context, connections=5, samples=20)


def test_what_is_excluded_stays(context: Context) -> None:
    step = {"connections": 1, "samples": 20, "exclude": ("1", "3.layers.0", "4.layers.2.weight")}
    details = rewire(context, **step)
    assert gone(details) == ["2.layers.2"]
    assert rows(details)["1.layers.2"]["influence"] is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"exclude": ("9",)}, "'9' matches no connection. There are 1.layers.2, 2.layers.2"),
        ({"exclude": ("?",)}, "exclude leaves none"),
    ],
)
def test_patterns_that_do_nothing_are_refused(context: Context, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidSpec, match=words):
        ResizeTechnique().applies(Rewire(connections=1, **fields), context.model)


def test_networks_without_such_ways_say_so(context: Context, tmp_path: Path) -> None:
    gates = ResizeTechnique().applies(Rewire(connections=1, what="gates"), context.model)
    assert gates is not None
    assert "no factor with weights" in gates
    with pytest.raises(Unsupported, match="no factor with weights"):
        rewire(context, connections=1, what="gates", samples=10)
    chain = of(nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).eval(), tmp_path)
    for what in ("branches", "skips"):
        assert ResizeTechnique().applies(Rewire(connections=1, what=what), chain.model) is not None


def test_what_went_with_an_earlier_one_does_not_go_again(tmp_path: Path) -> None:
    """A branch in a branch; and of two ways that meet one stays."""
    torch.manual_seed(0)
    outer = residual(64, 8)
    outer.layers.insert(1, residual(8, 4))
    wide = residual(64, 8)
    wide.shortcut = nn.Sequential(nn.Linear(64, 64))
    own = of(nn.Sequential(outer, wide, nn.Linear(64, 10)).eval(), tmp_path)
    parts = ways(own)
    by_name: dict[str, Connection] = {one.name: one for one in parts.free}
    assert set(by_name) == {"0.layers.1.layers.2", "0.layers.3", "1.layers.2", "1.shortcut.0"}
    assert not parts.may_go(by_name["0.layers.1.layers.2"], [by_name["0.layers.3"]])
    assert parts.may_go(by_name["0.layers.3"], [by_name["0.layers.1.layers.2"]])
    assert not parts.may_go(by_name["1.shortcut.0"], [by_name["1.layers.2"]])
    with pytest.raises(InvalidSpec, match=r"[23] connections may go, and 4"):
        rewire(own, connections=4, samples=20)


def test_code_becomes_a_program_and_the_same_one_when_it_is_taken_up_again(tmp_path: Path) -> None:
    module, inputs, _ = network("vit")
    model = model_of(module, inputs)
    own = context_for(model, DATA, tmp_path)
    graph = graph_of(model)
    one, *_ = connections(graph, batches_of(model)[0], "branches").found
    edit = {"kind": "cut", "join": one.join, "side": one.side}
    first, second = (restructure(own, [edit]) for _ in range(2))
    assert list(first.state_dict()) == list(second.state_dict())
    with torch.no_grad():
        assert torch.equal(first(*inputs), second(*inputs))


def test_blocks_of_what_has_become_a_graph_are_refused_with_advice(context: Context) -> None:
    graph = graph_of(context.model).module
    reason = ResizeTechnique().applies(Resize(layers=1), of(graph, context.scratch).model)
    assert reason is not None
    assert '"method": "connections"' in reason
