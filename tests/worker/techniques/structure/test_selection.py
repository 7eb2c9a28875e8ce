"""What a choice of units looks at, and groups of which nothing more can go."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from app.contract.budgets import TimedBudget
from app.contract.errors import InvalidSpec
from app.contract.structured import StructuredPrune
from app.contract.training import Training
from tests.worker.helpers import context_for, digits_data, tiny_model
from tests.worker.techniques.structure.test_structured import PICTURES, kept, network, of, prune
from worker.evaluation.macs import module_macs
from worker.techniques.base import Details
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.structure.importance import scores
from worker.techniques.structure.selection import _losses
from worker.techniques.structure.structured import structure_in

TWICE: dict[str, Any] = {"rounds": 2, "keep_at_least": 0, "training": Training(steps=1)}


def eights() -> nn.Sequential:
    """Two groups of eight neurons."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10))


def pruned(module: nn.Module, folder: Path, **fields: Any) -> Details:
    return prune(of(module, digits_data(PICTURES), folder), **TWICE, **fields)


@pytest.mark.parametrize("scope", ["global", "auto"])
def test_groups_of_which_one_unit_is_left_leave_none_to_choose(tmp_path: Path, scope: str) -> None:
    with pytest.raises(InvalidSpec, match="With the fewest units"):
        pruned(eights(), tmp_path, scope=scope, budget=TimedBudget(macs=0.02))


def test_a_sparsity_counts_groups_of_which_one_unit_is_left(tmp_path: Path) -> None:
    module = eights()
    with torch.no_grad():
        module.get_parameter("1.weight").mul_(torch.linspace(0.001, 1, 8).pow(8)[:, None])
    told = kept(pruned(module, tmp_path, sparsity=0.75))
    assert sum(stays for _, stays in told.values()) == 4


def test_a_look_at_what_is_lost_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    context = of(network(), digits_data(PICTURES), tmp_path)
    step = StructuredPrune(sparsity=0.5, scope="auto", samples=64)
    module = context.model.module
    before = copy.deepcopy(module.state_dict())
    groups = structure_in(context.model).groups
    losses = _losses(step, context, groups, scores(step, context, groups))
    assert all(torch.equal(own, module.state_dict()[name]) for name, own in before.items())
    for group in groups:
        told = [losses[group.name](count) for count in (group.units, group.units // 2, group.units // 4)]
        assert 0 == told[0] < told[1] <= told[2]


def test_auto_is_as_fine_as_two_percent_ask_for(tmp_path: Path) -> None:
    """A coarser multiple that is within 2 % of the finer one's share, and not of what is asked for, is none."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))
    context = context_for(tiny_model(module, shape=(64,)), None, tmp_path)
    PruneTechnique().apply(StructuredPrune(budget=TimedBudget(macs=0.5)), context)
    left = module_macs(context.model.module, (torch.zeros(1, 64),))
    assert 0.49 <= left / module_macs(module, (torch.zeros(1, 64),)) <= 0.5
