"""The resize step with method width, on real digits: multipliers, budgets, the search, and what is inherited."""

from __future__ import annotations

import copy
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.contract.budgets import TimedBudget
from app.contract.errors import DatasetMismatch, InvalidSpec
from app.contract.training import Training
from app.contract.widths import ResizeWidth
from tests.worker.helpers import context_for, memory_data, tiny_model
from tests.worker.structure.nets import network as small_network
from tests.worker.structure.support import model_of
from tests.worker.techniques.structure.test_structured import (
    PICTURES,
    Killed,
    accuracy,
    digits,
    kept,
    of,
    sizes,
    trained,
)  # fmt: skip
from worker.checkpoints.points import Checkpoints, Kind
from worker.context import Context
from worker.data.base import Data
from worker.structure import edits
from worker.structure.groups import structure_of
from worker.techniques.base import Details
from worker.techniques.pruning.sensitivity import drift
from worker.techniques.structure.limits import measured
from worker.techniques.structure.resize import ResizeTechnique
from worker.techniques.structure.statistics import Statistics

__all__ = ["digits", "trained"]
SEARCHED: dict[str, Any] = {"budget": TimedBudget(macs=0.5), "search": "evolutionary", "candidates": 12}


@pytest.fixture
def context(trained: nn.Module, digits: Data, tmp_path: Path) -> Context:
    return of(trained, digits, tmp_path)


def narrow(context: Context, **fields: Any) -> Details:
    return ResizeTechnique().apply(ResizeWidth(**{"round_to": 4, "samples": 64} | fields), context)


@pytest.mark.parametrize(("multiplier", "round_to"), [(0.5, 1), (0.5, 8), (0.7, 4), (0.9, 8)])
def test_every_group_keeps_its_share(context: Context, multiplier: float, round_to: int) -> None:
    details = narrow(context, multiplier=multiplier, round_to=round_to)
    units = (24, 24, 24, 32, 48)
    expected = [min(own, round(multiplier * own / round_to) * round_to) for own in units]
    assert list(kept(details).values()) == list(zip(units, expected, strict=True))
    layers: Any = context.model.module
    assert (layers[0].out_channels, layers[5].out_channels, layers[9].out_features) == (
        expected[0], expected[3], expected[4],
    )  # fmt: skip
    assert details["multiplier"] == multiplier
    for measure in ("parameters", "macs"):
        assert details[measure] == sizes(layers)[measure]
        assert details[f"{measure}_share"] == sizes(layers)[measure] / sizes(context.teacher)[measure]


def test_the_weights_that_are_left_are_those_of_the_best_units(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)).eval()
    context = context_for(tiny_model(copy.deepcopy(module)), None, tmp_path)
    narrow(context, multiplier=0.5, round_to=1)
    first, second = module[0].weight.detach(), module[2].weight.detach()
    worth = [float(first[unit].square().sum() + second[:, unit].square().sum()) ** 0.5 for unit in range(8)]
    best = sorted(sorted(range(8), key=lambda unit: -worth[unit])[:4])
    left: Any = context.model.module
    assert torch.equal(left[0].weight, first[best])
    assert torch.equal(left[0].bias, module[0].bias[best])  # type: ignore[index]
    assert torch.equal(left[2].weight, second[:, best])


@pytest.mark.parametrize("measure", ["parameters", "macs"])
@pytest.mark.parametrize("name", ["lstm", "residual", "excited"])
def test_a_budget_is_met_by_the_largest_multiplier(name: str, measure: str, tmp_path: Path) -> None:
    module, inputs, _ = small_network(name)
    model = model_of(copy.deepcopy(module), inputs)
    model.facts.__dict__["classes"] = 5
    context = context_for(model, None, tmp_path)
    whole = measured(measure, model)
    details = narrow(context, budget=TimedBudget(**{measure: 0.6}), round_to=1)
    assert measured(measure, context.model) <= 0.6 * whole
    groups = structure_of(module, inputs).groups
    told = {name: count for name, (_, count) in kept(details).items()}
    multiplier = float(details["multiplier"])  # type: ignore[arg-type]
    assert told == {group.name: max(1, round(multiplier * group.units)) for group in groups}
    more = multiplier
    while {group.name: max(1, round(more * group.units)) for group in groups} == told:
        more += 0.001
    other = context_for(model_of(copy.deepcopy(module), inputs), None, tmp_path)
    other.model.facts.__dict__["classes"] = 5
    if more < 1:
        narrow(other, multiplier=more, round_to=1)
        assert measured(measure, other.model) > 0.6 * whole


def test_a_budget_of_bytes_is_met(context: Context) -> None:
    narrow(context, budget=TimedBudget(bytes=0.4), round_to=1)
    left = sizes(context.model.module)["bytes"] / sizes(context.teacher)["bytes"]
    assert 0.37 < left <= 0.4


def test_a_budget_that_cannot_be_kept_says_what_could_be(context: Context) -> None:
    for fields in ({}, {"search": "evolutionary"}):
        with pytest.raises(InvalidSpec, match=r"smallest multiplier .* ([\d.]+)% of the macs are left, and 1\.0%"):
            narrow(context, keep_at_least=0.5, budget=TimedBudget(macs=0.01), **fields)
    assert context.edits == []


def test_what_takes_nothing_out_is_refused(context: Context) -> None:
    with pytest.raises(InvalidSpec, match="No group of units becomes smaller"):
        narrow(context, multiplier=0.99, round_to=8)


def test_what_is_excluded_stays(context: Context) -> None:
    details = narrow(context, multiplier=0.5, exclude=("5", "*.inside.0"))
    assert list(kept(details)) == ["0.weight", "9.weight"]
    assert context.model.module.get_submodule("5").out_channels == 32
    with pytest.raises(InvalidSpec, match="'nothing' matches no layer that makes units"):
        ResizeTechnique().applies(ResizeWidth(multiplier=0.5, exclude=("nothing",)), context.model)


def test_a_network_without_units_says_so() -> None:
    why = ResizeTechnique().applies(ResizeWidth(multiplier=0.5), tiny_model(nn.Sequential(nn.Linear(64, 10))))
    assert why is not None
    assert "no unit that could leave" in why


def test_statistics_are_found_again_and_that_shows(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = of(context.model.module, context.feed.data, context.scratch)  # type: ignore[union-attr]
    details = narrow(context, multiplier=0.7, round_to=1, reconstruct=False)
    assert details["batch_norms_estimated"] == 6
    monkeypatch.setattr(Statistics, "of", lambda *_: {})
    assert narrow(plain, multiplier=0.7, round_to=1, reconstruct=False)["batch_norms_estimated"] == 0
    assert accuracy(context) > accuracy(plain) + 0.1
    ours, theirs = context.model.module.state_dict(), plain.model.module.state_dict()
    differ = {name.rpartition(".")[2] for name, own in ours.items() if not torch.equal(own, theirs[name])}
    assert differ == {"running_mean", "running_var"}


def test_without_data_statistics_are_inherited_and_a_search_is_refused(trained: nn.Module, tmp_path: Path) -> None:
    assert narrow(of(trained, None, tmp_path), multiplier=0.5)["batch_norms_estimated"] == 0
    with pytest.raises(DatasetMismatch, match="Search evolutionary"):
        narrow(of(trained, None, tmp_path), **SEARCHED)


def score(context: Context, module: nn.Module) -> float:
    """How far a narrower network is from the whole one, with statistics of its own."""
    far = drift(context, 64, "")
    module = copy.deepcopy(module)
    Statistics(context, 64).of(module)
    return far(module.eval())


def test_the_search_scores_no_worse_than_uniform_and_says_what_is_so(
    trained: nn.Module, digits: Data, tmp_path: Path
) -> None:
    whole = of(trained, digits, tmp_path)
    uniform, searched = of(trained, digits, tmp_path), of(trained, digits, tmp_path)
    shares: list[float] = []
    searched.progress = shares.append
    one = narrow(uniform, budget=TimedBudget(macs=0.5), reconstruct=False)
    details = narrow(searched, **SEARCHED, reconstruct=False)
    assert float(details["divergence"]) < float(details["uniform_divergence"])  # type: ignore[arg-type]
    assert score(whole, uniform.model.module) == pytest.approx(details["uniform_divergence"], rel=1e-4)
    assert score(whole, searched.model.module) == pytest.approx(details["divergence"], rel=1e-4)
    assert details["uniform_multiplier"] == one["multiplier"]
    assert 6 < int(details["candidates_tried"]) <= 12  # type: ignore[arg-type]
    assert sizes(searched.model.module)["macs"] <= 0.5 * sizes(trained)["macs"]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    told = list(kept(details).values())
    assert told[1] == told[2]  # equal blocks stay equal
    rows: Any = details["multipliers"]
    assert [row["groups"] for row in rows] == [1, 2, 1, 1]


def test_candidates_are_judged_with_layers_fitted_again(trained: nn.Module, digits: Data, tmp_path: Path) -> None:
    fitted, plain = of(trained, digits, tmp_path), of(trained, digits, tmp_path)
    details, others = narrow(fitted, **SEARCHED), narrow(plain, **SEARCHED, reconstruct=False)
    assert int(details["reconstructed_layers"]) > 0  # type: ignore[arg-type]
    assert others["reconstructed_layers"] == 0
    assert float(details["divergence"]) < 0.5 * float(others["divergence"])  # type: ignore[arg-type]


def test_the_same_seed_finds_the_same(trained: nn.Module, digits: Data, tmp_path: Path) -> None:
    first, second = of(trained, digits, tmp_path), of(trained, digits, tmp_path)
    assert narrow(first, **SEARCHED) == narrow(second, **SEARCHED)
    assert first.edits == second.edits
    ours, theirs = first.model.module.state_dict(), second.model.module.state_dict()
    assert all(torch.equal(own, theirs[name]) for name, own in ours.items())


def tiny() -> nn.Sequential:
    """Two kinds, of five and of six units."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 10)).eval()


def test_where_all_candidates_may_be_tried_none_is_better(digits: Data, tmp_path: Path) -> None:
    flat = memory_data({"train": (digits.splits["train"].read(range(64)).inputs["input"].reshape(-1, 64), None)})
    context = context_for(tiny_model(tiny()), flat, tmp_path)
    x: Tensor = flat.splits["train"].read(range(64)).inputs["input"]
    net = tiny()
    usual = net(x).detach()
    budget = TimedBudget(parameters=0.7)
    details = narrow(context, budget=budget, search="evolutionary", candidates=1000, round_to=1, reconstruct=False)
    (first, second), whole = (net[0].weight, net[2].weight), sum(own.numel() for own in net.parameters())
    worth = [
        (first.square().sum(1) + second.square().sum(0)),  # type: ignore[operator]
        (second.square().sum(1) + net[4].weight.square().sum(0)),  # type: ignore[operator]
    ]
    best, tried = float("inf"), 0
    for counts in itertools.product(range(1, 6), range(1, 7)):
        one, two = (own.topk(count).indices for own, count in zip(worth, counts, strict=True))
        if counts[0] * 65 + counts[1] * (counts[0] + 1) + 10 * (counts[1] + 1) > 0.7 * whole:
            continue
        tried += 1
        hidden = torch.relu(x @ first[one].T + net[0].bias[one])
        hidden = torch.tanh(hidden @ second[two][:, one].T + net[2].bias[two])
        given = hidden @ net[4].weight[:, two].T + net[4].bias  # type: ignore[index, operator]
        far = nn.functional.kl_div(given.log_softmax(-1), usual.softmax(-1), reduction="batchmean")
        best = min(best, float(far.detach()))
    assert details["candidates_tried"] == tried
    assert details["divergence"] == pytest.approx(best, rel=1e-3)


def test_an_edit_is_left_that_makes_the_same_shapes(context: Context) -> None:
    narrow(context, **SEARCHED)
    assert context.edits is not None
    assert len(context.edits) == 1
    again = copy.deepcopy(context.teacher)
    edits.apply(again, context.edits)
    again.load_state_dict(context.model.module.state_dict())
    x = torch.randn(3, *PICTURES)
    assert torch.equal(again.eval()(x), context.model.module.eval()(x))


RESUMED: dict[str, Any] = SEARCHED | {"training": Training(epochs=1, lr=2e-3, checkpoint_steps=4)}


def test_after_a_kill_in_the_training_it_goes_on_there_and_ends_with_equal_bits(
    trained: nn.Module, digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = of(trained, digits, tmp_path / "whole")
    whole.scratch.mkdir()
    expected = narrow(whole, **RESUMED)
    assert accuracy(whole) > 0.9
    saved: dict[str, Path] = {}
    first = of(trained, digits, tmp_path)

    def announce(kind: Kind, name: str) -> None:
        saved[kind] = Path(shutil.copy(tmp_path / name, tmp_path / f"stored-{kind}"))

    def kill(share: float) -> None:
        if share > 0.8:
            raise Killed

    first.checkpoints, first.progress = Checkpoints(tmp_path, announce, 0.0), kill
    with pytest.raises(Killed):
        narrow(first, **RESUMED)
    assert saved
    second = of(trained, digits, tmp_path)
    second.checkpoints = Checkpoints(tmp_path, None, 0.0, saved)
    shares: list[float] = []
    second.progress = shares.append
    monkeypatch.setattr("worker.techniques.structure.width._Widths", None)  # nothing is chosen again
    found = narrow(second, **RESUMED)
    assert min(shares) > 0.5
    assert {name: own for name, own in found.items() if "resumed" not in name} == {
        name: own for name, own in expected.items() if "resumed" not in name
    }
    assert second.edits == whole.edits
    ours, theirs = second.model.module.state_dict(), whole.model.module.state_dict()
    assert all(torch.equal(own, theirs[name]) for name, own in ours.items())
