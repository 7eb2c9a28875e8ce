"""Criteria, scopes and patterns of the prune step: what is asked for is what is delivered, on layers of every kind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.contract.errors import DatasetMismatch, InvalidSpec
from app.contract.pruning import Prune
from app.contract.spec import Finetune
from app.contract.training import Training
from tests.worker.helpers import context_for, memory_data, tiny_model
from tests.worker.techniques.pruning.nets import KINDS
from worker.constraints import baked, masks
from worker.context import Context
from worker.techniques.base import Details
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.pruning.weights import prunable
from worker.techniques.training.finetune import FinetuneTechnique

WEIGHTS = 6_464  # of mlp()
AT_ONCE = ("magnitude", "random", "gradient", "taylor", "fisher", "wanda", "sparsegpt")


def prune(context: Context, **fields: Any) -> Details:
    step = Prune(**fields)
    assert PruneTechnique().applies(step, context.model) is None
    return PruneTechnique().apply(step, context)


def zeros(module: nn.Module) -> int:
    return sum(int((weight == 0).sum()) for weight in baked(module).parameters() if weight.ndim > 1)


def accuracy(context: Context) -> float:
    assert context.feed is not None
    module = baked(context.model.module)
    return context.feed.score(lambda inputs: module(*inputs), "test")[0]


def of_kind(kind: str, folder: Path) -> Context:
    make, inputs = KINDS[kind]
    torch.manual_seed(0)
    targets = torch.arange(len(inputs)) % 4
    data = memory_data({"train": (inputs, targets)})
    return context_for(tiny_model(make(), shape=tuple(inputs.shape[1:]), classes=4), data, folder)


@pytest.mark.parametrize("criterion", AT_ONCE)
@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_every_criterion_removes_just_what_is_asked_for(context: Context, criterion: str, sparsity: float) -> None:
    details = prune(context, criterion=criterion, sparsity=sparsity, samples=64)
    assert details["removed_weights"] == zeros(context.model.module)
    assert details["sparsity"] == pytest.approx(sparsity, abs=0.001)


def test_criteria_that_look_at_data_keep_more_than_chance(context: Context) -> None:
    found = {}
    for criterion in AT_ONCE:
        own = context_for(tiny_model(copy.deepcopy(context.model.module)), context.feed.data, context.scratch)  # type: ignore[union-attr]
        prune(own, criterion=criterion, sparsity=0.7, scope="layer", samples=256)
        found[criterion] = accuracy(own)
    assert found["random"] < 0.6
    assert min(value for name, value in found.items() if name not in ("random", "gradient")) > found["random"] + 0.1
    assert found["sparsegpt"] >= found["magnitude"]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:16", "1:2"])
@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "wanda", "sparsegpt"])
def test_n_of_m_is_exact_in_every_group_and_stays(context: Context, pattern: str, criterion: str) -> None:
    n, m = map(int, pattern.split(":"))
    details = prune(context, granularity=pattern, criterion=criterion, samples=64, training=Training(steps=5))
    FinetuneTechnique().apply(Finetune(training=Training(steps=5)), context)
    for name, weight in baked(context.model.module).named_parameters():
        if weight.ndim > 1:
            assert bool((weight.reshape(-1, m).count_nonzero(1) == n).all()), name
    assert details["sparsity"] == 1 - n / m


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fields", [{"sparsity": 0.6}, {"granularity": "2:4"}, {"granularity": "block", "block": (4, 2), "sparsity": 0.5}]
)
def test_layers_of_every_kind(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    context = of_kind(kind, tmp_path)
    details = prune(context, training=Training(steps=2), **fields)
    names = [weight.name for weight in prunable(context.model.module)]
    left = [row["name"] for row in details.get("layers_left_alone", [])]  # type: ignore[union-attr]
    assert sorted([row["name"] for row in details["layers"]] + left) == sorted(names)  # type: ignore[union-attr]
    assert set(masks(context.model.module)) == set(names) - set(left)
    assert details["sparsity"] == pytest.approx(fields.get("sparsity", 0.5), abs=0.02)


def groups_of(layer: nn.Module, weight: Tensor, size: int) -> Tensor:
    """Neighbours along the input dimension by torch's own documentation of the shapes."""
    inputs = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
    return weight.movedim(inputs, -1).reshape(-1, size)


def test_groups_lie_along_the_inputs(tmp_path: Path) -> None:
    context = of_kind("convolutions", tmp_path)
    prune(context, granularity="2:4")
    for layer in baked(context.model.module).modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            assert bool((groups_of(layer, layer.weight, 4).count_nonzero(1) == 2).all())


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("scope", ["global", "layer", "erk", "auto"])
def test_blocks_go_as_one_and_the_smallest_first(context: Context, norm: str, scope: str) -> None:
    before = {name: weight.detach().clone() for name, weight in context.model.module.named_parameters()}
    details = prune(context, granularity="block", block=(2, 4), sparsity=0.75, norm=norm, scope=scope)
    assert details["sparsity"] == pytest.approx(0.75, abs=0.001)
    for name, mask in masks(context.model.module).items():
        high, wide = mask.shape
        cut = mask.view(high // 2, 2, wide // 4, 4).permute(0, 2, 1, 3).reshape(-1, 8)
        assert bool((cut.all(1) | ~cut.any(1)).all())
        if scope == "layer":
            sizes = before[name].view(high // 2, 2, wide // 4, 4).permute(0, 2, 1, 3).reshape(-1, 8)
            scores = sizes.norm(1 if norm == "l1" else 2, dim=1)
            assert scores[cut.all(1)].min() >= scores[~cut.any(1)].max()


def test_layers_by_name_have_their_own_sparsity(context: Context) -> None:
    details = prune(context, sparsity=0.8, layers={"0": 0.95, "4*": 0.1})
    rows = {row["name"]: row for row in details["layers"]}  # type: ignore[union-attr]
    assert rows["0.weight"]["kept"] == 4096 - round(0.95 * 4096)
    assert rows["4.weight"]["kept"] == 320 - 32
    assert rows["2.weight"]["kept"] == 2048 - round(0.8 * 2048)
    own = prune(context, criterion="sparsegpt", sparsity=0.9, layers={"0.weight": 0.96}, samples=64)
    rows = {row["name"]: row for row in own["layers"]}  # type: ignore[union-attr]
    assert rows["0.weight"]["kept"] == 4096 - round(0.96 * 4096)


def test_erk_leaves_small_layers_denser(context: Context) -> None:
    details = prune(context, sparsity=0.9, scope="erk")
    kept = [row["kept"] / row["weights"] for row in details["layers"]]  # type: ignore[operator, union-attr]
    assert kept[0] < kept[1] < kept[2]
    assert kept[0] / kept[1] == pytest.approx((128 / 4096) / (96 / 2048), rel=0.02)
    assert details["removed_weights"] == round(0.9 * WEIGHTS)


def test_auto_prunes_by_the_curve_that_it_measured(context: Context) -> None:
    with torch.no_grad():  # what it does not depend on can go
        context.model.module.get_parameter("2.weight")[16:] *= 1e-4
        context.model.module.get_parameter("4.weight")[:, 16:] *= 1e-4
    before = accuracy(context)
    details = prune(context, sparsity=0.75, scope="auto")
    assert details["removed_weights"] == round(0.75 * WEIGHTS)
    curve = details["sensitivity"]
    assert isinstance(curve, list)
    assert {row["layer"] for row in curve} == {"0.weight", "2.weight", "4.weight"}
    for name in ("0.weight", "2.weight", "4.weight"):
        own = [row["divergence"] for row in curve if row["layer"] == name]
        assert all(value >= -1e-5 for value in own)  # type: ignore[operator]
        assert own[-1] > own[0]  # type: ignore[operator]
    auto = accuracy(context)
    assert auto > before - 0.25
    assert len(masks(context.model.module)) == 3


def test_auto_measures_without_labels(trained: nn.Module, tmp_path: Path) -> None:
    inputs = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    data = memory_data({"calibration": (inputs, None)})
    context = context_for(tiny_model(copy.deepcopy(trained)), data, tmp_path)
    assert "sensitivity" in prune(context, sparsity=0.5, scope="auto")
    with pytest.raises(DatasetMismatch):
        prune(context, sparsity=0.9, criterion="taylor")


def test_the_fisher_score_is_that_of_single_samples(context: Context) -> None:
    from worker.techniques.pruning.gradients import mean_gradients, mean_squares

    weights = prunable(context.model.module)
    squares, means = mean_squares(context, weights, 6), mean_gradients(context, weights, 6)
    assert context.feed is not None
    order = torch.Generator().manual_seed(context.seed)
    (batch,) = context.feed.batches("train", 6, shuffle=order, limit=6)
    assert batch.targets is not None
    gradients = []
    for row in range(6):
        context.model.module.zero_grad()
        loss = nn.functional.cross_entropy(
            context.model.module(batch.inputs[0][row : row + 1]), batch.targets[row : row + 1]
        )
        loss.backward()
        gradients.append(context.model.module.get_parameter("2.weight").grad.clone())  # type: ignore[union-attr]
    context.model.module.zero_grad()
    torch.testing.assert_close(squares[1], torch.stack(gradients).square().mean(0))
    torch.testing.assert_close(means[1], torch.stack(gradients).mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"granularity": "2:5"}, "groups of 2:5"),
        ({"granularity": "block", "block": (7, 7), "sparsity": 0.5}, "blocks of 7x7"),
        ({"sparsity": 0.5, "layers": {"9*": 0.5}}, r"layers: '9\*' matches no layer"),
    ],
)
def test_what_fits_no_weight_is_refused(context: Context, fields: dict[str, Any], sentence: str) -> None:
    model = tiny_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)))
    with pytest.raises(InvalidSpec, match=sentence):
        PruneTechnique().applies(Prune(**fields), model)


def test_inputs_that_are_not_finite_are_named(context: Context) -> None:
    with torch.no_grad():
        context.model.module.get_parameter("0.bias")[3] = float("nan")
    with pytest.raises(InvalidSpec, match="nothing finite comes into '2'"):
        prune(context, criterion="wanda", sparsity=0.5)
