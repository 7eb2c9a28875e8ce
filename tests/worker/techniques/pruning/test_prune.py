"""The prune step on real digits: exact sparsity, at once and gradually, and an accuracy worth having."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from app.contract.distillation import Distill
from app.contract.errors import InvalidSpec
from app.contract.pruning import Prune
from app.contract.spec import Finetune
from app.contract.training import EarlyStopping, Training
from tests.worker.helpers import context_for, memory_data, mlp, tiny_model
from tests.worker.test_constraints import Tied
from worker.constraints import baked, masks
from worker.context import Context
from worker.techniques.base import Details
from worker.techniques.pruning.choosing import Chooser
from worker.techniques.pruning.grain import Elements
from worker.techniques.pruning.growing import Growing
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.pruning.scoring import scorer
from worker.techniques.pruning.weights import WeightSet, select
from worker.techniques.training.finetune import FinetuneTechnique
from worker.training.loop import train

WEIGHTS = 6_464  # of mlp()
DISTILLED = Training(epochs=8, lr=3e-3, schedule="cosine", distill=Distill())


def prune(context: Context, **fields: Any) -> Details:
    return PruneTechnique().apply(Prune(**fields), context)


def zeros(module: nn.Module) -> int:
    """Zeros among the matrices of what would be delivered."""
    return sum(int((weight == 0).sum()) for weight in baked(module).parameters() if weight.ndim > 1)


def measured(context: Context, module: nn.Module) -> float:
    assert context.feed is not None
    module = baked(module)
    return context.feed.score(lambda inputs: module(*inputs), "test")[0]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(
    "rest",
    [
        {},
        {"training": Training(epochs=1)},
        {"schedule": "cubic", "training": Training(epochs=2)},
        {"schedule": "cubic", "training": Training(steps=1)},
        {"schedule": "cubic", "training": Training(epochs=6, early_stopping=EarlyStopping(patience=1))},
    ],
    ids=["one_shot", "one_shot then trained", "cubic", "cubic in one step", "cubic stopped early"],
)
def test_the_sparsity_is_hit_exactly_however_it_is_reached(context: Context, scope: str, rest: dict[str, Any]) -> None:
    details = prune(context, sparsity=0.8, scope=scope, **rest)
    per_layer = [round(0.8 * n) for n in (64 * 64, 64 * 32, 32 * 10)]
    wanted = round(0.8 * WEIGHTS) if scope == "global" else sum(per_layer)
    assert details["prunable_weights"] == WEIGHTS
    assert details["removed_weights"] == wanted == zeros(context.model.module)
    assert details["sparsity"] == wanted / WEIGHTS
    assert ("training_steps" in details) == ("training" in rest)
    layers = details["layers"]
    assert isinstance(layers, list)
    assert [row["name"] for row in layers] == ["0.weight", "2.weight", "4.weight"]
    if scope == "layer":
        assert [row["weights"] - row["kept"] for row in layers] == per_layer  # type: ignore[operator]


@pytest.mark.parametrize("initial", [0.0, 0.7])
def test_the_sparsity_grows_along_the_cubic(context: Context, initial: float) -> None:
    if initial:
        prune(context, sparsity=initial)
    step = Prune(sparsity=0.9, schedule="cubic", training=Training(steps=96))
    weights = WeightSet(context.model.module, select(context.model.module, ()))
    gradual = Growing(step, Chooser(step, context, weights, Elements(), scorer(step, context, weights)), weights)
    seen: list[float] = []

    def watched(number: int, total: int) -> bool:
        settled = gradual(number, total)
        seen.append(1 - sum(int(mask.sum()) for mask in masks(context.model.module).values()) / WEIGHTS)
        assert settled == (number >= 72)
        return settled

    train(context, Training(steps=96), watched)
    assert len(seen) == 96
    for number, sparsity in enumerate(seen):
        formula = 0.9 + (initial - 0.9) * (1 - min(number, 72) / 72) ** 3
        assert sparsity == pytest.approx(formula, abs=1 / WEIGHTS)


def test_eighty_percent_sparse_and_distilled_stays_within_three_points(context: Context) -> None:
    before = measured(context, context.model.module)
    details = prune(context, sparsity=0.8, schedule="cubic", training=DISTILLED)
    assert before > 0.9
    assert measured(context, context.model.module) >= before - 0.03
    assert details["sparsity"] == pytest.approx(0.8, abs=1e-4)


def test_what_was_pruned_stays_pruned_through_finetuning(context: Context) -> None:
    prune(context, sparsity=0.7)
    pruned = {name: ~mask for name, mask in masks(context.model.module).items()}
    FinetuneTechnique().apply(
        Finetune(training=Training(epochs=2, optimizer="sgd", lr=0.05, weight_decay=0.01)), context
    )
    weights = baked(context.model.module).state_dict()
    assert all(not weights[name][gone].any() for name, gone in pruned.items())
    assert zeros(context.model.module) == round(0.7 * WEIGHTS)


@pytest.mark.parametrize(("second", "expected"), [(0.9, 0.9), (0.5, 0.7)])
@pytest.mark.parametrize("schedule", ["one_shot", "cubic"])
def test_a_second_prune_goes_on_and_never_back(context: Context, second: float, expected: float, schedule: str) -> None:
    prune(context, sparsity=0.7)
    before = masks(context.model.module)
    before = {name: mask.clone() for name, mask in before.items()}
    details = prune(context, sparsity=second, schedule=schedule, training=Training(epochs=1))
    assert details["removed_weights"] == round(expected * WEIGHTS) == zeros(context.model.module)
    assert all(bool((before[name] | ~mask).all()) for name, mask in masks(context.model.module).items())


def test_a_threshold_removes_what_is_below_it(context: Context) -> None:
    weights = [weight.detach().numpy() for weight in context.model.module.parameters() if weight.ndim > 1]
    expected = sum(int((abs(weight) < 0.05).sum()) for weight in weights)
    details = prune(context, threshold=0.05)
    assert 0 < expected < WEIGHTS
    assert details["removed_weights"] == expected == zeros(context.model.module)


def test_a_threshold_that_empties_a_layer_is_refused_by_name(context: Context) -> None:
    with torch.no_grad():
        context.model.module.get_parameter("2.weight").mul_(1e-3)
    with pytest.raises(InvalidSpec, match=r"removes every weight of 2\.weight, .* or exclude '2'"):
        prune(context, threshold=0.01)
    assert masks(context.model.module) == {}
    prune(context, threshold=0.01, exclude=("2",))
    assert "2.weight" not in masks(context.model.module)


def test_global_pruning_leaves_a_small_layer_its_minimum_and_says_so(context: Context) -> None:
    with torch.no_grad():
        context.model.module.get_parameter("2.weight").mul_(1e-6)
    details = prune(context, sparsity=0.8)
    assert details["layers_held_at_minimum"] == 1
    assert details["removed_weights"] == round(0.8 * WEIGHTS)
    assert isinstance(details["layers"], list)
    assert details["layers"][1]["kept"] == details["layers"][1]["minimum"] == 41  # a tenth of a fifth of 2,048


def test_a_sparsity_that_leaves_less_than_a_weight_a_layer_is_refused(context: Context) -> None:
    with pytest.raises(InvalidSpec, match="6464 weights for 3 layers"):
        prune(context, sparsity=0.9999)


def test_excluded_layers_are_left_whole(context: Context) -> None:
    details = prune(context, sparsity=0.5, exclude=("4",))
    assert details["prunable_weights"] == WEIGHTS - 320
    assert "4.weight" not in masks(context.model.module)


def test_a_weight_that_layers_share_is_counted_once(tmp_path: Path) -> None:
    ids = torch.randint(0, 12, (16, 5), generator=torch.Generator().manual_seed(0))
    data = memory_data({"train": (ids, ids[:, 0])})
    context = context_for(tiny_model(Tied(), shape=(5,), classes=12), data, tmp_path)
    details = prune(context, sparsity=0.5, schedule="cubic", training=Training(epochs=3))
    assert details["prunable_weights"] == 72
    assert details["removed_weights"] == 36
    delivered = baked(context.model.module)
    assert int((delivered.state_dict()["output.weight"] == 0).sum()) == 36
    assert isinstance(delivered, Tied)
    assert delivered.output.weight is delivered.embedding.weight


def test_it_does_not_apply_where_there_is_nothing_to_prune() -> None:
    step = Prune(sparsity=0.5)
    assert PruneTechnique().applies(step, tiny_model(mlp())) is None
    assert PruneTechnique().applies(step, tiny_model(nn.Sequential(nn.BatchNorm1d(4)))) is not None


def test_finetuning_does_not_apply_without_weights() -> None:
    assert FinetuneTechnique().applies(Finetune(), tiny_model(mlp())) is None
    assert FinetuneTechnique().applies(Finetune(), tiny_model(nn.Sequential(nn.ReLU()))) is not None


def test_an_exclude_that_names_a_norm_is_refused_before_any_step() -> None:
    model = tiny_model(mlp(norm=True))
    with pytest.raises(InvalidSpec, match="'1' matches no layer that the step is for"):
        PruneTechnique().applies(Prune(sparsity=0.5, exclude=("1",)), model)
