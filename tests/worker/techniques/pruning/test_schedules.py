"""Masks along trainings: rounds, rewinding, movement, regrowth; and all of it again after an interruption."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.contract.pruning import Prune, Regrowth
from app.contract.training import Training
from tests.worker.helpers import context_for, tiny_model
from tests.worker.techniques.pruning.test_patterns import WEIGHTS, accuracy, prune, zeros
from worker.constraints import baked, masks
from worker.context import Context
from worker.techniques.pruning.prune import PruneTechnique
from worker.training.loop import train
from worker.training.states import module_state

WAYS: dict[str, dict[str, Any]] = {
    "iterative": {"schedule": "iterative", "rounds": 4, "training": Training(epochs=12, lr=3e-3)},
    "iterative without training": {"schedule": "iterative", "rounds": 4},
    "learning rate": {
        "schedule": "iterative", "rounds": 3, "rewind": "learning_rate", "training": Training(epochs=2, lr=3e-3)
    },
    "weights": {"schedule": "iterative", "rounds": 3, "rewind": "weights", "training": Training(epochs=2, lr=3e-3)},
    "movement": {"schedule": "cubic", "criterion": "movement", "training": Training(epochs=6, lr=3e-3)},
    "movement in rounds": {
        "schedule": "iterative", "rounds": 5, "criterion": "movement", "training": Training(epochs=25, lr=3e-3)
    },
    "regrowth": {"regrow": Regrowth(every=10), "training": Training(epochs=4, lr=3e-3)},
    "cubic and regrowth": {"schedule": "cubic", "regrow": Regrowth(every=10), "training": Training(epochs=4, lr=3e-3)},
    "taylor along a cubic": {
        "schedule": "cubic", "criterion": "taylor", "samples": 64, "training": Training(epochs=4, lr=3e-3)
    },
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scope", ["global", "erk"])
def test_every_way_ends_at_the_sparsity_and_a_network_worth_having(context: Context, way: str, scope: str) -> None:
    details = prune(context, sparsity=0.9, scope=scope, **WAYS[way])
    assert details["removed_weights"] == round(0.9 * WEIGHTS) == zeros(context.model.module)
    if way != "iterative without training":
        assert accuracy(context) > 0.7
    assert not any(mask.watched for mask in context.model.module.modules() if hasattr(mask, "watched"))


@pytest.mark.parametrize("way", ["movement", "regrowth", "cubic and regrowth", "learning rate"])
def test_earlier_masks_hold_through_masks_that_move(context: Context, way: str) -> None:
    prune(context, sparsity=0.5)
    gone = {name: ~mask for name, mask in masks(context.model.module).items()}
    prune(context, sparsity=0.8, **WAYS[way])
    weights = baked(context.model.module).state_dict()
    assert all(not weights[name][own].any() for name, own in gone.items())
    assert zeros(context.model.module) == round(0.8 * WEIGHTS)


def test_regrowth_brings_weights_back_where_the_gradient_asks(context: Context) -> None:
    once = copy.deepcopy(context.model.module)
    prune(context, sparsity=0.9)
    first = {name: mask.clone() for name, mask in masks(context.model.module).items()}
    context.model.module.load_state_dict(context.model.module.state_dict())
    again = context_for(tiny_model(once), context.feed.data, context.scratch)  # type: ignore[union-attr]
    details = prune(again, sparsity=0.9, **WAYS["regrowth"])
    assert isinstance(details["regrown_weights"], int)
    assert details["regrown_weights"] > 100
    back = sum(int((mask & ~first[name]).sum()) for name, mask in masks(again.model.module).items())
    assert 50 < back <= details["regrown_weights"]
    lively = baked(again.model.module).state_dict()
    assert any(lively[name][mask & ~first[name]].any() for name, mask in masks(again.model.module).items())


def test_rewinding_weights_begins_every_round_at_the_uploaded_ones(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = {name: tensor.clone() for name, tensor in module_state(context.model.module).items()}
    begun: list[dict[str, Tensor]] = []
    from worker.techniques.pruning import rounds

    def watched(own: Context, training: Training) -> Any:
        begun.append({name: value.clone() for name, value in baked(own.model.module).state_dict().items()})
        return train(own, training)

    monkeypatch.setattr(rounds, "train", watched)
    details = prune(context, sparsity=0.9, **WAYS["weights"])
    assert [round(row["sparsity"], 3) for row in details["rounds"]] == [0.536, 0.784, 0.9]  # type: ignore[union-attr]
    for weights in begun:
        for name, value in weights.items():
            assert bool(((value == start[name]) | (value == 0)).all())


def test_rewinding_the_rate_goes_on_from_what_was_trained(context: Context) -> None:
    before = context.model.module.get_parameter("0.bias").clone()
    details = prune(context, sparsity=0.9, **WAYS["learning rate"])
    losses = [row["last_epoch_loss"] for row in details["rounds"]]  # type: ignore[union-attr]
    assert len(losses) == 3
    assert not torch.equal(before, context.model.module.get_parameter("0.bias"))


def test_movement_keeps_what_grows_and_not_what_is_large(tmp_path: Path) -> None:
    """Two inputs, of which the small weight's says everything and the large weight's is noise."""
    from tests.worker.helpers import memory_data

    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 2, generator=random)
    targets = (inputs[:, 0] > 0).long()
    module = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[-0.1, 1.0], [0.1, 1.0]]))
    for criterion, expected in (("movement", [True, False]), ("magnitude", [False, True])):
        model = tiny_model(copy.deepcopy(module), shape=(2,), classes=2)
        context = context_for(model, memory_data({"train": (inputs, targets)}), tmp_path)
        training = Training(steps=40, optimizer="sgd", momentum=0, lr=0.02)
        step = Prune(sparsity=0.5, scope="layer", criterion=criterion, schedule="cubic", training=training)
        PruneTechnique().apply(step, context)
        (mask,) = masks(context.model.module).values()
        assert mask.tolist() == [expected, expected]
