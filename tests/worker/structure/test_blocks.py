"""Which blocks may go, what a network is without them, and how that is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.contract.architecture import Architecture
from tests.worker.helpers import tiny_model
from worker.constraints import baked
from worker.loading.layers import Residual, build
from worker.structure.blocks import Block, blocks, bypassed, kept_without, passed, varied
from worker.structure.described import described, without
from worker.structure.dropping import dropped, origin, shortened
from worker.structure.edits import apply

LINEAR = {"type": "Linear", "in_features": 16, "out_features": 16}
RELU = {"type": "ReLU"}
BLOCK = {"type": "Residual", "layers": [LINEAR, RELU, LINEAR]}
LAYERS: list[dict[str, Any]] = [
    {"type": "Linear", "in_features": 8, "out_features": 16},
    {"type": "Sequential", "layers": [BLOCK, {"type": "Sequential", "layers": [LINEAR, RELU]}]},
    {"type": "Sequential", "layers": [{"type": "Sequential", "layers": [BLOCK]}]},
    RELU,
    {"type": "Residual", "layers": [RELU]},
    {"type": "Sequential", "layers": [LINEAR]},
    {"type": "Linear", "in_features": 16, "out_features": 10},
    {"type": "Sequential", "layers": [{"type": "Linear", "in_features": 10, "out_features": 5}]},
]
NAMES = ["1.0", "1.1", "2.0.0", "5"]


class Block3(nn.Module):
    """Like a layer of transformers: gives a tuple, and is called by name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.layer_idx = 0

    def forward(self, mask: float = 1.0, *, states: Tensor) -> tuple[Tensor, int]:
        return states + mask * torch.tanh(self.inner(states)), self.layer_idx


class Stack(nn.Module):
    def __init__(self, way: str = "plain", count: int = 3) -> None:
        super().__init__()
        self.way = way
        self.layers = nn.ModuleList(Block3(8) for _ in range(count))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(count))
        for place, layer in enumerate(self.layers):
            layer.layer_idx = place
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(())
        for layer in self.layers:
            x, place = layer(states=x)
            if self.way == "summed":
                total = total + x.sum(-1, keepdim=True)
            if self.way == "counted":
                x = x * (place + 1)
        if self.way == "fixed":
            x = x + self.layers[2](states=x)[0]
        answer: Tensor = self.out(x + total)
        return answer


class Stages(nn.Module):
    """Stages that widen, and hold blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for given, made in ((8, 8), (8, 16)):
            stage = nn.Module()
            stage.widen = nn.Linear(given, made)
            stage.blocks = nn.ModuleList(Block3(made) for _ in range(2))
            stage.forward = lambda x, own=stage: self.stage(own, x)  # type: ignore[method-assign]
            self.stages.append(stage)
        self.out = nn.Linear(16, 5)

    @staticmethod
    def stage(own: Any, x: Tensor) -> Tensor:
        x = own.widen(x)
        for block in own.blocks:
            x = block(states=x)[0]
        return x

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        answer: Tensor = self.out(x)
        return answer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return build(Architecture.model_validate({"layers": LAYERS}).layers).eval()


def found(module: nn.Module) -> tuple[list[str], dict[str, str]]:
    told = blocks(tiny_model(module.eval(), shape=(8,), classes=5))
    return [one.name for one in told.found], told.kept


def test_of_an_architecture_what_nests_and_keeps_its_shape() -> None:
    assert found(network()) == (NAMES, {"7": "it gives [2, 5] where it takes [2, 10]"})


def test_of_others_the_entries_of_lists_of_layers() -> None:
    torch.manual_seed(0)
    assert found(Stack()) == ([f"layers.{place}" for place in range(3)], {})
    assert found(Stages()) == ([f"stages.{stage}.blocks.{place}" for stage in (0, 1) for place in (0, 1)], {})


@pytest.mark.parametrize(
    ("way", "count", "kept"),
    [
        ("plain", 1, {"layers.0": "only one of its stack"}),
        ("summed", 3, dict.fromkeys(("layers.0", "layers.1", "layers.2"), "reads more of it than what it gives")),
        ("counted", 3, dict.fromkeys(("layers.0", "layers.1", "layers.2"), "reads more of it than what it gives")),
        ("fixed", 3, {"layers.0": "does not run", "layers.1": "does not run", "layers.2": "computes 2 times"}),
    ],
)
def test_what_cannot_go_says_why(way: str, count: int, kept: dict[str, str]) -> None:
    torch.manual_seed(0)
    names, told = found(Stack(way, count))
    assert names == []
    assert told.keys() == kept.keys()
    assert all(kept[name] in told[name] for name in kept)


def test_what_only_one_of_them_has_may_be_for_all() -> None:
    module = Stack()
    module.layers[0].bias = nn.Linear(8, 8)
    names, told = found(module)
    assert names == ["layers.1", "layers.2"]
    assert "bias.bias, which others of its kind lack" in told["layers.0"]


def test_a_network_of_blocks_alone_keeps_one() -> None:
    module = nn.Sequential(Residual(nn.Sequential(nn.Linear(8, 8)), nn.Sequential()), nn.Flatten())
    told = blocks(tiny_model(module.eval(), shape=(8,), classes=8))
    assert (told.found, told.kept) == ([], {"0": "without it the network has no weights"})


@pytest.mark.parametrize("gone", [["1.0"], ["2.0.0"], ["1.0", "1.1"], NAMES, ["5", "2.0.0"]])
def test_without_blocks_a_network_is_what_it_is_if_they_give_what_they_take(gone: list[str]) -> None:
    module = network()
    model = tiny_model(module, shape=(8,), classes=5)
    own = [one for one in blocks(model).found if one.name in gone]
    inputs = varied(model)
    with bypassed(own):
        wanted = passed(module, inputs)
    assert not torch.equal(wanted, passed(module, inputs))
    kept = kept_without(module, own)
    shorter = baked(module)
    apply(shorter, [dropped(kept, {})])
    assert torch.equal(passed(shorter, inputs), wanted)
    layers = Architecture.model_validate({"layers": LAYERS}).layers
    again = build(described(without(layers, kept), shorter).layers).eval()  # type: ignore[arg-type]
    again.load_state_dict(shorter.state_dict())
    assert torch.equal(passed(again, inputs), wanted)
    before = module.state_dict()
    assert all(torch.equal(own, before[origin(name, kept)]) for name, own in shorter.state_dict().items())


def test_a_stack_that_would_be_empty_leaves_its_own() -> None:
    module = network()
    named = {one.name: one for one in blocks(tiny_model(module, shape=(8,), classes=5)).found}
    assert kept_without(module, [named["2.0.0"]]) == {"": [0, 1, 3, 4, 5, 6, 7]}
    assert kept_without(module, [named["1.1"], named["5"]]) == {"": [0, 1, 2, 3, 4, 6, 7], "1": [0]}


def test_for_a_while_only() -> None:
    torch.manual_seed(0)
    module = Stack()
    module.config = type("Config", (), {})()  # type: ignore[assignment]
    module.config.num_hidden_layers = 3  # type: ignore[union-attr]
    before = list(module.state_dict())
    with shortened(module, {"layers": [0, 2]}, {"num_hidden_layers": 2}):
        assert [one.layer_idx for one in module.layers] == [0, 1]
        assert module.config.num_hidden_layers == 2
        assert "layers.1.inner.weight" in module.state_dict()
        assert "layers.2.inner.weight" not in module.state_dict()
    assert [one.layer_idx for one in module.layers] == [0, 1, 2]
    assert module.config.num_hidden_layers == 3
    assert list(module.state_dict()) == before


@pytest.mark.parametrize("kept", [{"layers": [0, 3]}, {"nothing": [0]}])
def test_what_is_not_there_is_no_place(kept: dict[str, list[int]]) -> None:
    with pytest.raises(AttributeError):
        apply(Stack(), [dropped(kept, {})])


def test_bypassing_keeps_what_else_a_block_gives() -> None:
    block = Block3(8)
    block.layer_idx = 7
    x = torch.randn(2, 8)
    with bypassed([Block("0", "", 0, 1, 0, block)]):
        states, place = block(states=x)
    assert torch.equal(states, x)
    assert place == 7
