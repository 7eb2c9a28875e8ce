"""Layers behind units that went give again what they gave: exactly, where the other units say the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from app.contract.structured import StructuredPrune
from app.contract.training import Training
from tests.worker.helpers import context_for, digits_data, memory_data, tiny_model
from worker.structure.groups import structure_of
from worker.structure.narrowing import left
from worker.structure.sound import without
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.structure.reconstruction import Reconstruction
from worker.techniques.structure.renewal import Renewal
from worker.techniques.structure.statistics import Found
from worker.training.loop import train

STAY = 5  # units of those that are looked at


class Pair(nn.Module):
    """A layer that reads what another makes; of its units each is a sum of the first few."""

    def __init__(self, first: nn.Module, second: nn.Module, dim: int) -> None:
        super().__init__()
        self.first, self.second = first, second
        with torch.no_grad():
            weight = first.get_parameter("weight").movedim(dim, 0)
            weight[STAY:] = torch.einsum("us,s...->u...", torch.randn(len(weight) - STAY, STAY), weight[:STAY])

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x))
        return found


def linear() -> tuple[nn.Module, tuple[int, ...]]:
    return Pair(nn.Linear(8, 12, bias=False), nn.Linear(12, 3), 0), (8,)


def convolution() -> tuple[nn.Module, tuple[int, ...]]:
    return Pair(nn.Conv2d(2, 12, 3, bias=False), nn.Conv2d(12, 4, 3, stride=2, padding=1), 0), (2, 9, 9)


def of_gpt2() -> tuple[nn.Module, tuple[int, ...]]:
    first = Conv1D(12, 8)
    nn.init.normal_(first.weight)
    return Pair(first, Conv1D(3, 12), 1), (8,)


def cut(module: nn.Module, stay: int, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, nn.Module, Found]:
    """Without all but the first units of every group: with the weights that it had, and fitted again."""
    module.eval()
    structure = structure_of(module, tuple(own[:2] for own in inputs))
    kept = {group.name: torch.arange(min(stay, group.units)) for group in structure.groups}
    made, _ = without(module, structure, structure.groups, kept)
    plain = copy.deepcopy(made)
    batches = list(zip(*(own.split(8) for own in inputs), strict=True))
    return (
        plain,
        made,
        Reconstruction(module, batches[1:], batches[:1]).of(made, left(structure, structure.groups, kept)),
    )


def far(module: nn.Module, other: nn.Module, *inputs: Tensor) -> float:
    """Of the outputs, relative to their size."""
    with torch.no_grad():
        expected, given = module.eval()(*inputs), other.eval()(*inputs)
    return float((given - expected).norm() / expected.norm())


@pytest.mark.parametrize("make", [linear, convolution, of_gpt2])
def test_units_that_others_say_as_well_are_made_up_for(make: Any) -> None:
    torch.manual_seed(0)
    module, shape = make()
    plain, made, found = cut(module, STAY, (torch.randn(96, *shape),))
    assert set(found) == {"second.weight", "second.bias"}
    assert all(torch.equal(own, made.state_dict()[name]) for name, own in found.items())
    x = torch.randn(64, *shape)
    assert far(module, made, x) < 0.05  # what damping leaves
    assert far(module, plain, x) > 0.5


def test_without_samples_nothing_is_fitted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, shape = linear()
    context = context_for(tiny_model(module, shape=shape), None, tmp_path)
    structure = structure_of(module, (torch.randn(2, *shape),))
    kept = {group.name: torch.arange(STAY) for group in structure.groups}
    made, _ = without(module, structure, structure.groups, kept)
    entries = left(structure, structure.groups, kept)
    assert Renewal(StructuredPrune(sparsity=0.5), context).of(made, entries) == {}
    assert torch.equal(made.state_dict()["second.weight"], module.state_dict()["second.weight"][:, :STAY])


def test_batch_norms_keep_their_statistics_where_layers_give_what_they_gave(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pair = Pair(nn.Conv2d(3, 12, 3, bias=False), nn.Conv2d(12, 4, 3), 0)
    module = nn.Sequential(pair, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(64, 3, 8, 8)
    for _ in range(100):
        module.train()(torch.randn(64, 3, 8, 8))
    context = context_for(tiny_model(module.eval(), shape=(3, 8, 8)), memory_data({"train": (x, x)}), tmp_path)
    structure = structure_of(module, (x[:2],))
    group = next(one for one in structure.groups if one.units == 12)
    made, _ = without(module, structure, [group], {group.name: torch.arange(STAY)})
    entries = left(structure, [group], {group.name: torch.arange(STAY)})
    found = Renewal(StructuredPrune(sparsity=0.5, reconstruct=True), context).of(made, entries)
    assert set(found) == {"0.second.weight", "0.second.bias"}
    assert far(module, made, x) < 0.05


def test_a_layer_that_computes_twice_or_shares_its_weight_stays() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.twice = nn.Linear(6, 12), nn.Linear(12, 12)
            self.one, self.other = nn.Linear(12, 12), nn.Linear(12, 12)
            self.other.weight = self.one.weight
            self.last = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.twice(torch.relu(self.twice(torch.relu(self.first(x)))))
            found: Tensor = self.last(torch.relu(self.other(torch.relu(self.one(x)))))
            return found

    torch.manual_seed(0)
    *_, found = cut(Odd(), 8, (torch.randn(96, 6),))
    assert {name.partition(".")[0] for name in found} <= {"last"}


class Own(nn.Linear):
    """Half of a product."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Named(nn.Linear):
    """Called by name only."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(input=x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Own, Named])
def test_what_does_not_compute_plainly_stays(kind: type[nn.Linear]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), kind(12, 12), nn.ReLU(), nn.Linear(12, 3))
    *_, found = cut(module, 8, (torch.randn(96, 6),))
    assert {name.partition(".")[0] for name in found} <= {"4"}


class Ways(nn.Module):
    """Layers that read the same, each in a way of its own."""

    def __init__(self, other: nn.Module, *, inplace: bool = False) -> None:
        super().__init__()
        self.first, self.one, self.other = nn.Conv2d(2, 12, 3, padding=1), nn.Conv2d(12, 6, 3, padding=1), other
        self.act = nn.ReLU(inplace=inplace)
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        found: Tensor = self.last(self.act(self.one(x)) + self.other(x))
        return found


@pytest.mark.parametrize(
    "other", [nn.Conv2d(12, 6, 1), nn.Conv2d(12, 6, 3, padding=2, dilation=2), nn.Conv2d(12, 6, 3, padding="same")]
)
def test_layers_that_read_the_same_in_other_ways_are_each_fitted_to_what_they_read(other: nn.Module) -> None:
    """In a row of blocks, whose layers are looked at together, as alone."""
    torch.manual_seed(0)
    block = Ways(copy.deepcopy(other))
    x = torch.randn(96, 2, 9, 9)

    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            last = nn.Conv2d(4, 2, 1)
            self.blocks = nn.ModuleList([nn.Sequential(copy.deepcopy(block), last), nn.Sequential(block, last)])

        def forward(self, x: Tensor) -> Tensor:
            for one in self.blocks:
                x = one(x)
            return x

    row = Row()
    alone = nn.Sequential(*copy.deepcopy(list(row.blocks)))
    told = []
    for module in (row, alone):
        plain, made, found = cut(module, 8, (x,))
        assert far(module, made, x) < far(module, plain, x)
        told.append({name.removeprefix("blocks."): own for name, own in found.items()})
    assert told[0].keys() == told[1].keys()
    for name, own in told[0].items():
        assert torch.allclose(own, told[1][name], atol=1e-3), name


def test_what_comes_behind_may_compute_in_place() -> None:
    torch.manual_seed(0)
    usual = Ways(nn.Conv2d(12, 6, 3, padding=1))
    inplace = copy.deepcopy(usual)
    inplace.act = nn.ReLU(inplace=True)
    x = torch.randn(96, 2, 9, 9)
    told = [cut(module, 8, (x,))[2] for module in (usual, inplace)]
    assert told[0].keys() == told[1].keys()
    assert all(torch.allclose(own, told[1][name], atol=1e-4) for name, own in told[0].items())


class Experts(nn.Module):
    """Samples are sent where what was made of them says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(6, 12), nn.ModuleList([nn.Linear(12, 3) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        way = (x.sum(1) > 3).long()
        found = x.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            at = (way == number).nonzero().flatten()
            found = found.index_add(0, at, expert(x[at]))
        return found


def test_layers_that_see_other_samples_than_they_did_stay() -> None:
    torch.manual_seed(0)
    plain, made, found = cut(Experts(), 6, (torch.randn(96, 6),))
    assert found == {}
    assert all(torch.equal(own, made.state_dict()[name]) for name, own in plain.state_dict().items())


def test_blocks_of_transformers_come_nearer() -> None:
    """Feed-forward layers of half the width: block for block, as those before them have become."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=60)
    network = BertForSequenceClassification(config).eval()

    class Hidden(nn.Module):
        """What comes out of the last block."""

        def __init__(self) -> None:
            super().__init__()
            self.bert = network.bert

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.bert(input_ids=ids).last_hidden_state
            return found

    module = Hidden().eval()
    ids = torch.randint(0, 60, (96, 10))
    structure = structure_of(module, (ids[:2],))
    groups = [group for group in structure.groups if "intermediate" in group.name]
    kept = {group.name: torch.arange(group.units // 2) for group in groups}
    made, _ = without(module, structure, groups, kept)
    plain = copy.deepcopy(made)
    batches = [(own,) for own in ids.split(8)]
    found = Reconstruction(module, batches[2:], batches[:2]).of(made, left(structure, groups, kept))
    assert sum(name.endswith("output.dense.weight") for name in found) == 3
    assert far(module, made, ids) < 0.9 * far(module, plain, ids)


def test_where_the_outputs_are_no_nearer_layers_keep_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever layers say of themselves."""

    def worse(_: object, made: nn.Module, entries: object) -> Found:
        with torch.no_grad():
            made.get_parameter("4.weight").mul_(-1)
        return {"4.weight": made.get_parameter("4.weight").detach()}

    torch.manual_seed(0)
    monkeypatch.setattr(Reconstruction, "of", worse)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    context = context_for(tiny_model(network), digits_data(), tmp_path)
    before = network[4].weight.detach().clone()
    details = PruneTechnique().apply(StructuredPrune(sparsity=0.25, exclude=("2",), round_to=1), context)
    assert details["reconstructed_layers"] == 0
    assert torch.equal(context.model.module.state_dict()["4.weight"], before)


def test_a_network_of_real_digits_is_more_often_right_before_any_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    context = context_for(tiny_model(network), digits_data(), tmp_path)
    train(context, Training(epochs=8, lr=3e-3))
    right = {}
    for reconstruct in (False, True):
        (tmp_path / str(reconstruct)).mkdir()
        own = context_for(tiny_model(copy.deepcopy(network)), digits_data(), tmp_path / str(reconstruct))
        step = StructuredPrune(sparsity=0.75, scope="local", round_to=1, reconstruct=reconstruct)
        details = PruneTechnique().apply(step, own)
        assert details["reconstructed_layers"] == (2 if reconstruct else 0)
        module = own.model.module.eval()
        assert own.feed is not None
        right[reconstruct] = own.feed.score(lambda inputs, module=module: module(*inputs), "validation")[0]
    assert right[True] > right[False] + 0.05
