"""What leaves a graph changes nothing for any batch and length, and what would change something stays."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from app.contract.fusing import PASSES
from tests.worker.loading.programs import exported, load
from worker.constraints import baked
from worker.model import Model
from worker.structure.edits import apply
from worker.structure.fusing.idle import idle_layers
from worker.structure.fusing.judging import looked_at
from worker.structure.fusing.passes import Fusion, fuse, make
from worker.structure.fusing.simplified import nodes_by_kind

Way = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """[batch, 8] or [batch, length, 8] to classes, with something in the middle."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.drop = nn.Linear(8, 8), nn.Linear(8, 4), nn.Dropout(0.5)
        self.spare = nn.Linear(8, 100)
        self.register_buffer("table", torch.linspace(0, 1, 8))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(torch.relu(self.way(self, self.first(x))))
        return y if y.ndim == 2 else y.mean(1)


def program(folder: Path, way: Way, length: int | None = None) -> Model:
    inputs = torch.randn(3, 8) if length is None else torch.randn(3, length, 8)
    return load(exported(Net(way).eval(), inputs, axes=(0,) if length is None else (0, 1)), folder)


def fused(model: Model, *, for_inference: bool = False) -> tuple[Any, Fusion]:
    inputs = looked_at(model)
    found = fuse(model.module, inputs, inputs, PASSES, lambda name: None, for_inference=for_inference)
    made = baked(model.module)
    make(made, found.edits)
    return made, found


def same(model: Model, made: nn.Module, *, exact: bool = True) -> bool:
    """For batches and lengths that nothing was looked at with."""
    open_lengths = [5, 11] if None in model.facts.inputs[0].shape else [None]
    for batch in (1, 4, 7):
        for length in open_lengths:
            x = torch.randn(batch, *([] if length is None else [length]), 8)
            with torch.no_grad():
                wanted, given = model.module(x), made(x)
            if not (torch.equal(given, wanted) if exact else torch.allclose(given, wanted, atol=1e-6)):
                return False
    return True


def kinds(module: Any) -> Counter[str]:
    return Counter(nodes_by_kind(module))


IDLE: dict[str, Way] = {
    "add": lambda net, y: y + 0,
    "sub": lambda net, y: y - 0.0,
    "mul": lambda net, y: 1 * y,
    "div": lambda net, y: y / 1.0,
    "clone": lambda net, y: y.clone(),
    "to": lambda net, y: y.to(torch.float32, copy=True),
    "view": lambda net, y: y.view(y.shape[0], *y.shape[1:]),
    "transpose": lambda net, y: y.transpose(0, 1).transpose(1, 0),
    "permute": lambda net, y: y.permute(1, 2, 0).permute(2, 0, 1) if y.ndim == 3 else y.permute(0, 1),
}


@pytest.mark.parametrize("name", list(IDLE))
@pytest.mark.parametrize("length", [None, 6])
def test_what_changes_nothing_goes(name: str, length: int | None, tmp_path: Path) -> None:
    model = program(tmp_path, IDLE[name], length)
    made, found = fused(model)
    assert found.done["identities"] >= 1
    assert not kinds(made)[name]
    assert same(model, made)


CHANGES: dict[str, Way] = {
    "add of another number": lambda net, y: y + 1e-3,
    "a broadcast": lambda net, y: y[:, :1] + torch.zeros(8),
    "another dtype": lambda net, y: y.to(torch.float64).to(torch.float32) * 2,
    "a transposition": lambda net, y: y.transpose(0, 1).flip(1).transpose(0, 1),
    "a copy that is written to": lambda net, y: y + y.clone().mul_(2.0),
    "a view that is written to": lambda net, y: y.view(-1, 8).add_(1.0).sum() + y,
    "an integer division": lambda net, y: torch.div(y, 1, rounding_mode="floor"),
    "a part": lambda net, y: y[:, :9] * 1.5,
}


@pytest.mark.parametrize("name", list(CHANGES))
@pytest.mark.parametrize("length", [None, 6])
def test_what_changes_something_stays(name: str, length: int | None, tmp_path: Path) -> None:
    model = program(tmp_path, CHANGES[name], length)
    made, _ = fused(model)
    assert same(model, made)


def test_a_part_of_what_may_be_longer_stays(tmp_path: Path) -> None:
    """The first 1,000 are all of them for every length that is looked at."""
    model = program(tmp_path, lambda net, y: y[:, :1000], 6)
    made, _ = fused(model)
    x = torch.randn(2, 1200, 8)
    with torch.no_grad():
        assert torch.equal(made(x), model.module(x))


def test_reshapes_of_reshapes_are_one(tmp_path: Path) -> None:
    model = program(tmp_path, lambda net, y: y.view(-1, 2, 4).view(y.shape[0], 4, 2).reshape(y.shape[0], 8) * 2)
    made, found = fused(model)
    assert kinds(made)["view"] + kinds(made)["reshape"] == 0
    assert same(model, made)
    assert found.done["identities"] >= 2


def test_equal_operators_are_one(tmp_path: Path) -> None:
    model = program(tmp_path, lambda net, y: torch.sigmoid(y * 2) * torch.sigmoid(y * 2) + y.mul(2))
    made, found = fused(model)
    assert (kinds(model.module)["sigmoid"], kinds(made)["sigmoid"]) == (2, 1)
    assert found.done["common"] == 3
    assert same(model, made)


def test_whole_numbers_and_floats_are_not_one(tmp_path: Path) -> None:
    model = program(tmp_path, lambda net, y: y + (torch.arange(8) * 3 // 2) + (torch.arange(8) * 3.0 / 2))
    made, _ = fused(model)
    assert same(model, made, exact=False)


def test_what_draws_is_not_one(tmp_path: Path) -> None:
    model = program(tmp_path, lambda net, y: net.drop(y) + net.drop(y))
    made, found = fused(model)
    dropouts = [node for node in made.graph.nodes if node.op == "call_module" and "drop" in str(node.target)]
    assert len(dropouts) == 2
    assert not found.done["common"]
    gone, _ = fused(model, for_inference=True)
    assert not any("drop" in str(node.target) for node in gone.graph.nodes)
    assert same(model, gone)


def test_constants_are_stored_where_they_take_no_more_bytes(tmp_path: Path) -> None:
    model = program(tmp_path, lambda net, y: y * net.table.cos().exp() + torch.arange(8).float().sqrt())
    made, found = fused(model)
    assert found.done["constants"] == 2
    assert not kinds(made).keys() & {"cos", "exp", "arange", "sqrt"}
    assert same(model, made)
    assert {row["name"] for row in found.dead} == {"table", "spare"}
    wide = program(tmp_path / "wide", lambda net, y: y * torch.arange(20_000).float().cos()[None].expand(9, -1)[:8, 0])
    made, _ = fused(wide)
    assert sum(own.numel() for own in made.buffers()) < 1000
    assert same(wide, made)


def test_what_a_training_may_change_is_no_constant(tmp_path: Path) -> None:
    model = program(tmp_path, lambda net, y: y * net.spare.weight[:8, 0].exp())
    made, found = fused(model)
    assert not found.done["constants"]
    assert kinds(made)["exp"] == 1


def test_unused_weights_go(tmp_path: Path) -> None:
    model = program(tmp_path, lambda net, y: y)
    made, found = fused(model)
    assert {"name": "spare", "values": 900} in found.dead
    assert "spare.weight" not in dict(made.named_parameters())
    assert same(model, made)


def test_told_again_it_makes_the_same_graph(tmp_path: Path) -> None:
    model = program(tmp_path, lambda net, y: (y + 0) * net.table.cos() + torch.sigmoid(y) * torch.sigmoid(y))
    made, found = fused(model)
    again = copy.deepcopy(model.module)
    apply(again, found.edits)
    assert isinstance(again, fx.GraphModule)
    assert [str(node) for node in again.graph.nodes] == [str(node) for node in made.graph.nodes]
    again.load_state_dict(made.state_dict())
    assert same(model, again)


def test_what_is_delivered_holds_it(tmp_path: Path) -> None:
    model = program(tmp_path, lambda net, y: (y + 0) * net.table.cos())
    made, _ = fused(model)
    (tmp_path / "out").mkdir()
    path = model.save(made, tmp_path / "out")
    again = load(path.read_bytes(), tmp_path / "again")
    assert same(model, again.module)
    assert path.stat().st_size < (tmp_path / "upload.pt2").stat().st_size
    assert not kinds(again.module).keys() & {"cos", "add"}


def test_layers_of_an_architecture_that_change_nothing() -> None:
    def row(*layers: nn.Module) -> nn.Sequential:
        return nn.Sequential(*layers)

    relu, flat, same_, drop = nn.ReLU(), nn.Flatten(), nn.Identity(), nn.Dropout(0.1)
    net = row(nn.Linear(4, 4), relu, nn.ReLU(), row(same_), flat, nn.Flatten(), drop, nn.Flatten(2), nn.Linear(4, 4))
    assert idle_layers(net, for_inference=False) == ["2", "5", "3.0"]
    assert idle_layers(net, for_inference=True) == ["2", "5", "6", "3.0"]
    assert idle_layers(row(nn.Linear(4, 4), nn.Identity()), for_inference=True) == []  # what is last stays
