"""Weights without any effect: found, dropped, and the outputs are the same without them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tests.worker.helpers import context_for, memory_data, tiny_model
from worker.constraints import baked, masks
from worker.techniques.pruning.dead import drop_dead
from worker.techniques.pruning.weights import WeightSet, select


def test_what_nothing_depends_on_goes_and_no_output_changes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(300, 6, generator=generator)
    inputs[:, 2] = 0  # a border that is always black
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        module[0].bias[1] = -100.0  # never fires
        module[2].weight[:, 4] = 0.0  # nobody hears neuron 4 ...
        module[4].weight[:, 3] = 0.0  # ... nor neuron 3 of the second layer
    context = context_for(tiny_model(module, shape=(6,), classes=3), memory_data({"train": (inputs, None)}), tmp_path)
    before = module(inputs).detach()
    weights = WeightSet(module, select(module, ()))
    weights.drop([torch.zeros(8, 6, dtype=torch.bool), module[2].weight == 0, module[4].weight == 0])
    count = drop_dead(context, weights, 300)
    kept = masks(module)
    assert not kept["0.weight"][:, 2].any()
    assert not kept["0.weight"][[1, 4]].any()
    assert not kept["2.weight"][3].any()
    assert not kept["2.weight"][:, 1].any()
    assert count >= 6 + 2 * 6 + 5 + 5 - 4
    assert not module[0].bias[[1, 4]].any()
    assert not module[2].bias[3].any()
    torch.testing.assert_close(baked(module)(inputs), before)
    assert int(kept["4.weight"].sum()) == 12


def test_a_network_that_is_alive_keeps_everything(tmp_path: Path) -> None:
    inputs = torch.rand(64, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    context = context_for(tiny_model(module, shape=(6,), classes=3), memory_data({"train": (inputs, None)}), tmp_path)
    assert drop_dead(context, WeightSet(module, select(module, ())), 64) == 0


def test_a_saturated_neuron_has_no_gradient_and_still_matters(tmp_path: Path) -> None:
    inputs = torch.rand(64, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3))
    with torch.no_grad():
        module[0].bias[2] = 200.0  # always 1
    context = context_for(tiny_model(module, shape=(6,), classes=3), memory_data({"train": (inputs, None)}), tmp_path)
    before = module(inputs).detach()
    assert drop_dead(context, WeightSet(module, select(module, ())), 64) == 0
    assert torch.equal(module(inputs), before)
