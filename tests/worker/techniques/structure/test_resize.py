"""The resize step: influence is what it says it is, budgets are met by the fewest blocks, and what goes is gone."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from app.contract.budgets import Budget
from app.contract.errors import InvalidSpec
from app.contract.resizing import Resize
from app.contract.training import Training
from tests.worker.helpers import context_for, digits_data, memory_data, part_of, tiny_model
from worker.context import Context
from worker.data.base import Data
from worker.evaluation.macs import module_macs
from worker.loading.layers import Residual
from worker.structure.blocks import Block, blocks, bypassed
from worker.techniques.base import Details
from worker.techniques.pruning.sensitivity import drift
from worker.techniques.structure.influence import OfBlocks, cosines, taylor
from worker.techniques.structure.influence_math import first_order, one_minus_cosine
from worker.techniques.structure.resize import ResizeTechnique
from worker.training.loop import train

DEPTH = 4
DATA = part_of(digits_data(), {"train": 200, "validation": 60, "test": 200})


def residual(width: int, inner: int) -> Residual:
    layers = nn.Sequential(nn.Linear(width, inner), nn.Tanh(), nn.Linear(inner, width))
    return Residual(layers, nn.Sequential())


def deep() -> nn.Sequential:
    """64 -> 24, blocks of inner widths 8, 16, 24 and 32, 24 -> 10."""
    torch.manual_seed(0)
    inner = (residual(24, 8 * (place + 1)) for place in range(DEPTH))
    return nn.Sequential(nn.Linear(64, 24), *inner, nn.Linear(24, 10))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    context = context_for(tiny_model(deep()), DATA, tmp_path_factory.mktemp("deep"))
    train(context, Training(epochs=8, lr=5e-3))
    return context.model.module.eval()


@pytest.fixture
def context(trained: nn.Module, tmp_path: Path) -> Context:
    return of(copy.deepcopy(trained), tmp_path)


def of(module: nn.Module, folder: Path, data: Data = DATA, **shape: Any) -> Context:
    return context_for(tiny_model(module, **shape), data, folder)


def resize(context: Context, **fields: Any) -> Details:
    return ResizeTechnique().apply(Resize(**fields), context)


def rows(details: Details) -> dict[str, dict[str, Any]]:
    told: Any = details["blocks"]
    return {row["name"]: row for row in told}


def gone(details: Details) -> set[str]:
    return {name for name, row in rows(details).items() if row["dropped"]}


def found(context: Context) -> list[Block]:
    return blocks(context.model).found


def train_inputs(data: Data) -> tuple[Tensor, Tensor]:
    raw = data.splits["train"].read(range(len(data.splits["train"])))
    assert isinstance(raw.inputs, dict)
    assert raw.targets is not None
    return raw.inputs["input"], raw.targets


def test_block_influence_is_one_minus_the_mean_cosine(context: Context) -> None:
    told = cosines(context, OfBlocks(context.model.module, found(context)), 1000)  # all that there are
    module = context.model.module
    states = train_inputs(DATA)[0].numpy().astype(np.float64)
    states = states @ module[0].weight.detach().numpy().T + module[0].bias.detach().numpy()
    for place in range(1, DEPTH + 1):
        first, _, second = (layer for layer in module[place].layers)
        inner = np.tanh(states @ first.weight.detach().numpy().T + first.bias.detach().numpy())
        after = states + inner @ second.weight.detach().numpy().T + second.bias.detach().numpy()
        cosine = (states * after).sum(1) / np.linalg.norm(states, axis=1) / np.linalg.norm(after, axis=1)
        assert told[str(place)] == pytest.approx(1 - cosine.mean(), rel=1e-4)
        states = after


def test_places_count_alike_and_padding_does_not() -> None:
    given, made = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    counted = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    a, b = given.double().numpy(), made.double().numpy()
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    told = one_minus_cosine(given, made, counted).numpy()
    np.testing.assert_allclose(told, [1 - cosine[0, :3].mean(), 1 - cosine[1].mean()])
    pictures = one_minus_cosine(given.transpose(1, 2)[..., None], made.transpose(1, 2)[..., None]).numpy()
    np.testing.assert_allclose(pictures, 1 - cosine.mean(1))


def test_taylor_is_the_slope_of_the_loss_along_the_way_to_the_identity(context: Context) -> None:
    data = part_of(DATA, {"train": 6})
    own = found(context)
    context = of(context.model.module.double(), context.scratch, memory_double(data))
    told = taylor(context, OfBlocks(context.model.module, own), 6)
    inputs, targets = train_inputs(data)
    for block in own:
        slopes = []
        for x, y in zip(inputs.double(), targets, strict=True):
            losses = [_loss(context.model.module, block, 1 + step, x[None], y[None]) for step in (-1e-5, 1e-5)]
            slopes.append(abs(losses[1] - losses[0]) / 2e-5)
        assert told[block.name] == pytest.approx(np.mean(slopes), rel=1e-5)


def memory_double(data: Data) -> Data:
    inputs, targets = train_inputs(data)
    return memory_data({"train": (inputs.double(), targets)})


def _loss(module: nn.Module, block: Block, factor: float, x: Tensor, y: Tensor) -> float:
    """Where the block gives what it takes and so many times what it adds to that."""
    hook = block.module.register_forward_hook(lambda _, given, made: given[0] + factor * (made - given[0]))
    try:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(module(x), y))
    finally:
        hook.remove()


def test_first_order_is_of_each_sample() -> None:
    gradient, given, made = (torch.randn(3, 4, 5) for _ in range(3))
    by_hand = np.abs(np.einsum("sij,sij->s", gradient.double(), (made.double() - given.double())))
    np.testing.assert_allclose(first_order(gradient, given, made).numpy(), by_hand)


def test_greedy_takes_each_time_the_block_that_moves_the_outputs_least(context: Context) -> None:
    own = {one.name: one for one in found(context)}
    told = drift(context, 50, "")
    expected: list[str] = []
    for _ in range(3):
        moved = {}
        for name in own.keys() - set(expected):
            with bypassed([own[one] for one in (*expected, name)]):
                moved[name] = told()
        expected.append(min(moved, key=lambda name: moved[name]))
        details = resize(of(copy.deepcopy(context.model.module), context.scratch), layers=len(expected),
                         criterion="greedy", samples=50)  # fmt: skip
        assert gone(details) == set(expected)
        assert rows(details)[expected[-1]]["influence"] == pytest.approx(moved[expected[-1]])
    best = min(itertools.combinations(own, 1), key=lambda names: _moved(context, [own[name] for name in names]))
    assert set(best) == {expected[0]}


def _moved(context: Context, chosen: list[Block]) -> float:
    told = drift(context, 50, "")
    with bypassed(chosen):
        return told()


@pytest.mark.parametrize("criterion", ["cosine", "taylor", "greedy"])
def test_those_of_least_influence_go_and_the_rest_is_as_it_was(context: Context, criterion: str) -> None:
    module = copy.deepcopy(context.model.module)
    own = blocks(tiny_model(module)).found
    details = resize(context, layers=2, criterion=criterion, samples=50)
    told = rows(details)
    assert list(told) == [str(place) for place in range(1, DEPTH + 1)]
    if criterion != "greedy":
        order = sorted(told, key=lambda name: told[name]["influence"])
        assert gone(details) == set(order[:2])
    x, _ = train_inputs(DATA)
    with torch.no_grad(), bypassed([one for one in own if one.name in gone(details)]):
        wanted = module(x)
    with torch.no_grad():
        assert torch.equal(context.model.module(x), wanted)
    assert len(context.model.module) == 2 + DEPTH - 2
    assert [edit["kind"] for edit in context.edits or ()] == ["drop"]


@pytest.mark.parametrize("measure", ["parameters", "macs", "bytes"])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_a_budget_is_met_by_the_fewest_in_order(context: Context, measure: str, share: float) -> None:
    module = copy.deepcopy(context.model.module)
    details = resize(context, budget=Budget(**{measure: share}), samples=50)
    left = context.model.module
    own = "parameters" if measure == "bytes" else measure
    assert details["parameters"] == count(left)
    assert details["macs"] == module_macs(left, context.model.example(1))
    assert details[f"{own}_share"] <= share  # type: ignore[operator]
    order = sorted(rows(details), key=lambda name: rows(details)[name]["influence"])
    chosen = order[: len(gone(details))]
    assert gone(details) == set(chosen)
    with_one_more = copy.deepcopy(module)
    for name in sorted(chosen[:-1], reverse=True):
        del with_one_more[int(name)]
    if own == "parameters":
        assert count(with_one_more) > share * count(module)
    else:
        example = context.model.example(1)
        assert module_macs(with_one_more, example) > share * module_macs(module, example)


def count(module: nn.Module) -> int:
    return sum(own.numel() for own in module.parameters())


def test_a_budget_that_cannot_be_met_says_what_could_be(context: Context) -> None:
    before = copy.deepcopy(context.model.module.state_dict())
    ends = count(context.model.module[0]) + count(context.model.module[-1])
    share = f"{ends / count(context.model.module):.1%}"
    with pytest.raises(InvalidSpec, match=rf"all 4 blocks that may go {share} of the parameters are left, .* 10.0%"):
        resize(context, budget=Budget(parameters=0.1), samples=20)
    with pytest.raises(InvalidSpec, match="4 blocks may go, and 5 are asked for"):
        resize(context, layers=5, samples=20)
    after = context.model.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_what_is_excluded_stays(context: Context) -> None:
    step = {"layers": 2, "samples": 20, "exclude": ("1", "3.layers.0", "4.layers.2.weight")}
    with pytest.raises(InvalidSpec, match="1 blocks may go, and 2"):
        resize(context, **step)
    details = resize(context, **{**step, "layers": 1})
    assert gone(details) == {"2"}
    assert rows(details)["1"]["influence"] is None


@pytest.mark.parametrize(
    ("exclude", "words"), [(("9",), "'9' matches no block. There are 1, 2, 3, 4"), (("?",), "exclude leaves none")]
)
def test_patterns_that_do_nothing_are_refused(context: Context, exclude: tuple[str, ...], words: str) -> None:
    with pytest.raises(InvalidSpec, match=words):
        ResizeTechnique().applies(Resize(layers=1, exclude=exclude), context.model)


class Lists(nn.Module):
    """Two stacks, of which each keeps one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.ModuleList(residual(64, 4) for _ in range(2))
        self.second = nn.ModuleList(residual(64, 4) for _ in range(2))
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.first, *self.second):
            x = block(x)
        answer: Tensor = self.out(x)
        return answer


@pytest.mark.parametrize("criterion", ["cosine", "greedy"])
def test_every_list_keeps_one(criterion: str, tmp_path: Path) -> None:
    own = of(Lists().eval(), tmp_path)
    details = resize(own, layers=2, criterion=criterion, samples=20)
    assert {name.partition(".")[0] for name in gone(details)} == {"first", "second"}
    with pytest.raises(InvalidSpec, match="2 blocks may go, and 3"):
        resize(of(Lists().eval(), tmp_path), layers=3, criterion=criterion, samples=20)


def test_training_recovers(context: Context) -> None:
    inputs, targets = train_inputs(DATA)

    def loss(own: Context) -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(own.model.module.eval()(inputs), targets))

    alone = of(copy.deepcopy(context.model.module), context.scratch)
    resize(alone, layers=3, samples=50)
    resize(context, layers=3, samples=50, training=Training(epochs=6, lr=3e-3))
    assert len(context.model.module) == len(alone.model.module) == 3
    assert loss(context) < 0.9 * loss(alone)
