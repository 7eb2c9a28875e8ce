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
from worker.context import Context
from worker.structure.groups import structure_of
from worker.structure.narrowing import left
from worker.structure.sound import without
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.structure.reconstruction import Reconstruction
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


def around(module: nn.Module, shape: tuple[int, ...], folder: Path) -> Context:
    x = torch.randn(96, *shape, generator=torch.Generator().manual_seed(0))
    data = memory_data({"train": (x, torch.zeros(96, dtype=torch.long))})
    return context_for(tiny_model(module, shape=shape), data, folder)


def cut(context: Context, stay: int, example: tuple[Tensor, ...], **options: Any) -> tuple[nn.Module, Found]:
    """Without all but the first units of every group, and fitted again."""
    module = context.model.module.eval()
    structure = structure_of(module, example)
    kept = {group.name: torch.arange(min(stay, group.units)) for group in structure.groups}
    made, _ = without(module, structure, structure.groups, kept)
    found = Reconstruction(context, options.get("samples", 96)).of(made, left(structure, structure.groups, kept))
    return made, found


@pytest.mark.parametrize("make", [linear, convolution, of_gpt2])
def test_units_that_others_say_as_well_are_made_up_for(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, shape = make()
    context = around(module, shape, tmp_path)
    x = torch.randn(64, *shape)
    made, found = cut(context, STAY, (x,))
    assert set(found) == {"second.weight", "second.bias"}
    plain = copy.deepcopy(made)
    weight = context.model.module.state_dict()["second.weight"]
    plain.get_parameter("second.weight").data = weight.narrow(0 if make is of_gpt2 else 1, 0, STAY)
    with torch.no_grad():
        expected = module(x)
        far, before = (float((own.eval()(x) - expected).norm() / expected.norm()) for own in (made, plain))
    assert far < 0.05  # what damping leaves
    assert before > 0.5
    assert made.state_dict()["second.weight"].shape != module.state_dict()["second.weight"].shape


def test_without_samples_nothing_changes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, shape = linear()
    context = context_for(tiny_model(module, shape=shape), None, tmp_path)
    made, found = cut(context, STAY, (torch.randn(4, *shape),))
    assert found == {}
    assert torch.equal(made.state_dict()["second.weight"], module.state_dict()["second.weight"][:, :STAY])


def test_a_layer_that_computes_twice_or_shares_its_weight_stays(tmp_path: Path) -> None:
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
    _, found = cut(around(Odd(), (6,), tmp_path), 8, (torch.randn(4, 6),))
    assert {name.partition(".")[0] for name in found} <= {"last"}


def test_blocks_of_transformers_come_nearer(tmp_path: Path) -> None:
    """Feed-forward layers of half the width: block for block, as those before them have become."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=60)
    network = BertForSequenceClassification(config).eval()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.network(input_ids=ids).logits
            return found

    module = Logits().eval()
    ids = torch.randint(0, 60, (96, 10))
    context = around(module, (10,), tmp_path)
    reconstruction = Reconstruction(context, 0)
    reconstruction._batches = [(own,) for own in ids.split(8)]
    structure = structure_of(module, (ids[:2],))
    groups = [group for group in structure.groups if "intermediate" in group.name]
    kept = {group.name: torch.arange(group.units // 2) for group in groups}
    made, _ = without(module, structure, groups, kept)
    plain = copy.deepcopy(made)
    found = reconstruction.of(made, left(structure, groups, kept))
    assert sum(name.endswith("output.dense.weight") for name in found) == 3

    def far(other: nn.Module) -> float:
        told: list[Tensor] = []
        for one in (module, other):
            hook = one.network.bert.encoder.register_forward_hook(lambda _, __, out: told.append(out[0]))  # type: ignore[union-attr]
            with torch.no_grad():
                one(ids)
            hook.remove()
        return float((told[1] - told[0]).norm())

    assert far(made) < 0.9 * far(plain)


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
