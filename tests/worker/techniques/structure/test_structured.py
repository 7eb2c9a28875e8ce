"""The prune step with granularity structured, on real digits: budgets, what stays whatever is asked for, rounds."""

from __future__ import annotations

import copy
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.contract.budgets import TimedBudget
from app.contract.errors import DatasetMismatch, InvalidSpec
from app.contract.structured import GroupLasso, StructuredPrune
from app.contract.training import Training
from tests.worker.helpers import context_for, digits_data, tiny_model
from worker.checkpoints.points import Checkpoints, Kind
from worker.context import Context
from worker.data.base import Data
from worker.evaluation.macs import module_macs
from worker.structure import edits
from worker.structure.groups import structure_of
from worker.techniques.base import Details
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.structure import multiples
from worker.techniques.structure.lasso import Lasso
from worker.training.loop import train

PICTURES = (1, 8, 8)
BRIEF = Training(epochs=2, lr=2e-3, batch_size=64)
CRITERIA = ("l1", "l2", "taylor", "fisher", "bn_scale", "fpgm", "activations", "random")


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.inside(x))


def network() -> nn.Sequential:
    """Groups: 24 of the residual stream, 24 in each of two blocks, 32 channels, 48 neurons."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(24), nn.ReLU(), Block(24), Block(24),
        nn.Conv2d(24, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 48), nn.ReLU(), nn.Linear(48, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> Data:
    return digits_data(PICTURES)


@pytest.fixture(scope="module")
def trained(digits: Data, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    context = context_for(tiny_model(network(), shape=PICTURES), digits, tmp_path_factory.mktemp("trained"))
    train(context, Training(epochs=4, lr=3e-3))
    return context.model.module


@pytest.fixture
def context(trained: nn.Module, digits: Data, tmp_path: Path) -> Context:
    return of(trained, digits, tmp_path)


def of(module: nn.Module, data: Data | None, folder: Path) -> Context:
    own = context_for(tiny_model(copy.deepcopy(module), shape=PICTURES), data, folder)
    own.edits = []
    return own


def prune(context: Context, **fields: Any) -> Details:
    asked = {"round_to": 1, "samples": 64} | fields
    if "sparsity" not in asked:
        asked = {"budget": TimedBudget(parameters=0.5)} | asked
    return PruneTechnique().apply(StructuredPrune(**asked), context)


def accuracy(context: Context) -> float:
    assert context.feed is not None
    return context.feed.score(lambda inputs: context.model.module.eval()(*inputs), "test")[0]


def sizes(module: nn.Module) -> dict[str, int]:
    parameters = sum(own.numel() for own in module.parameters())
    return {"parameters": parameters, "macs": module_macs(module.eval(), (torch.zeros(1, *PICTURES),)),
            "bytes": 4 * parameters}  # fmt: skip


def kept(details: Details) -> dict[str, tuple[int, int]]:
    rows: Any = details["groups"]
    return {row["name"]: (row["units"], row["kept"]) for row in rows}


def assert_kept(context: Context, measure: str, share: float, near: float = 0.02) -> None:
    left = sizes(context.model.module)[measure] / sizes(context.teacher)[measure]
    assert share - near <= left <= share


@pytest.mark.parametrize(
    ("criterion", "scope"),
    [*((criterion, "global") for criterion in CRITERIA), ("l2", "local"), ("l2", "isomorphic"), ("taylor", "local")],
)
def test_every_criterion_and_scope_keeps_the_budget_and_uses_it(context: Context, criterion: str, scope: str) -> None:
    details = prune(context, criterion=criterion, scope=scope, budget=TimedBudget(macs=0.5))
    # Without a batch norm a group has no factors, and stays.
    assert_kept(context, "macs", 0.5, 0.05 if criterion == "bn_scale" else 0.02)
    after, before = sizes(context.model.module), sizes(context.teacher)
    for measure in ("parameters", "macs"):
        assert details[measure] == after[measure]
        assert details[f"{measure}_before"] == before[measure]
        assert details[f"{measure}_share"] == after[measure] / before[measure]
    assert details["criterion"] == criterion
    assert details["scope"] == scope


@pytest.mark.parametrize("criterion", ["l2", "taylor"])
def test_scope_auto_keeps_the_budget(context: Context, criterion: str) -> None:
    prune(context, criterion=criterion, scope="auto", budget=TimedBudget(macs=0.5))
    assert_kept(context, "macs", 0.5)


@pytest.mark.parametrize("share", [0.8, 0.3])
@pytest.mark.parametrize("measure", ["parameters", "macs", "bytes"])
def test_every_measure_is_kept(context: Context, measure: str, share: float) -> None:
    prune(context, budget=TimedBudget(**{measure: share}))
    assert_kept(context, measure, share)


def test_groups_are_those_of_the_network_and_layers_have_what_is_told(context: Context) -> None:
    told = kept(prune(context))
    assert [units for units, _ in told.values()] == [24, 24, 24, 32, 48]
    assert all(1 <= stays <= units for units, stays in told.values())
    layers: Any = context.model.module
    stream, one, two, channels, neurons = (stays for _, stays in told.values())
    assert layers[0].out_channels == layers[3].inside[3].out_channels == layers[5].in_channels == stream
    assert (layers[3].inside[0].out_channels, layers[4].inside[0].out_channels) == (one, two)
    assert (layers[5].out_channels, layers[9].in_features) == (channels, 4 * channels)
    assert (layers[9].out_features, layers[11].in_features, layers[11].out_features) == (neurons, neurons, 10)


def test_what_is_left_is_made_of_the_same_weights(context: Context) -> None:
    prune(context, exclude=("0", "5", "9", "4.*"), budget=TimedBudget(parameters=0.9), reconstruct=False)
    layers, before = context.model.module, context.teacher
    rows: Any = layers.get_submodule("3.inside.0").weight
    was: Any = before.get_submodule("3.inside.0").weight
    places = [int((was == row).flatten(1).all(1).nonzero()) for row in rows]
    assert places == sorted(places)
    assert len(places) < 24
    assert torch.equal(layers.get_submodule("3.inside.3").weight, before.get_submodule("3.inside.3").weight[:, places])  # type: ignore[index]


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_units_of_small_weights_go_first(context: Context, criterion: str) -> None:
    """Every other one of each group is made so small that nobody would miss it."""
    weights = {name: own.data for name, own in context.model.module.named_parameters() if own.ndim > 1}
    for group in structure_of(context.model.module, (torch.zeros(2, *PICTURES),)).groups:
        for cut in group.cuts:
            if (weight := weights.get(cut.parameter)) is not None:
                small = cut.places[1::2].reshape(-1)
                weight.index_copy_(cut.dim, small, 1e-3 * weight.index_select(cut.dim, small))
    prune(context, criterion=criterion, scope="local", sparsity=0.5, reconstruct=False)
    layers = [layer for layer in context.model.module if isinstance(layer, nn.Conv2d | nn.Linear)]
    norms = [layer.weight.detach().flatten(1).norm(dim=1) for layer in layers[:-1]]
    assert all(float(own.min() / own.max()) > 0.01 for own in norms)


@pytest.mark.parametrize("step", [8, 5, 256])
def test_groups_keep_a_multiple_or_all(context: Context, step: int) -> None:
    try:
        told = kept(prune(context, round_to=step, budget=TimedBudget(parameters=0.6)))
    except InvalidSpec:
        assert step == 256
        return
    assert all(stays % step == 0 or stays == units for units, stays in told.values())
    assert sizes(context.model.module)["parameters"] <= 0.6 * sizes(context.teacher)["parameters"]


@pytest.mark.parametrize("share", [0.65, 0.5, 0.3, 0.1])
def test_auto_is_the_first_multiple_that_meets_the_budget(
    trained: nn.Module, digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """The macs are met within 2 %, or as nearly as single units can."""
    monkeypatch.setattr(multiples, "block", lambda: multiples.NARROW)

    def pruned(round_to: Any) -> tuple[float, dict[str, tuple[int, int]]]:
        context = of(trained, digits, tmp_path)
        told = kept(prune(context, round_to=round_to, keep_at_least=0, budget=TimedBudget(macs=share)))
        return sizes(context.model.module)["macs"] / sizes(context.teacher)["macs"], told

    for round_to in multiples.FINER:
        try:
            expected = pruned(round_to)
        except InvalidSpec:
            continue
        if expected[0] >= 0.98 * share:
            break
    assert pruned("auto") == expected


def test_every_group_keeps_its_share(context: Context) -> None:
    told = kept(prune(context, keep_at_least=0.6, budget=TimedBudget(parameters=0.55)))
    assert all(stays >= 0.6 * units for units, stays in told.values())
    assert min(stays / units for units, stays in told.values()) < 0.7


def test_every_group_keeps_a_unit_whatever_is_asked_for(context: Context) -> None:
    told = kept(prune(context, keep_at_least=0, sparsity=0.95))
    assert min(stays for _, stays in told.values()) >= 1


@pytest.mark.parametrize("scope", ["global", "local"])
def test_a_sparsity_is_a_share_of_all_units(context: Context, scope: str) -> None:
    told = kept(prune(context, sparsity=0.4, scope=scope)).values()
    share = sum(stays for _, stays in told) / sum(units for units, _ in told)
    assert 0.58 <= share <= 0.6
    if scope == "local":
        assert all(abs(stays / units - 0.6) <= 1 / units + 0.01 for units, stays in told)


def test_what_is_excluded_stays(context: Context) -> None:
    details = prune(context, exclude=("5", "*.inside.0"), budget=TimedBudget(parameters=0.7))
    assert list(kept(details)) == ["0.weight", "9.weight"]
    layers: Any = context.model.module
    assert layers[5].out_channels == 32
    assert layers[3].inside[0].out_channels == layers[4].inside[0].out_channels == 24


@pytest.mark.parametrize("pattern", ["4.inside.3", "4.inside.3.weight", "0.weight"])
def test_one_layer_that_makes_units_keeps_the_group(context: Context, pattern: str) -> None:
    assert "0.weight" not in kept(prune(context, exclude=(pattern,), budget=TimedBudget(parameters=0.8)))


@pytest.mark.parametrize(
    ("exclude", "message"),
    [(("nothing",), r"'nothing' matches no layer that makes units\. There are 0, "), (("*",), "leaves no layer")],
)
def test_patterns_that_say_nothing_are_refused(context: Context, exclude: tuple[str, ...], message: str) -> None:
    step = StructuredPrune(sparsity=0.5, exclude=exclude)
    with pytest.raises(InvalidSpec, match=message):
        PruneTechnique().applies(step, context.model)


def test_a_network_without_units_says_so(context: Context) -> None:
    why = PruneTechnique().applies(StructuredPrune(sparsity=0.5), tiny_model(nn.Sequential(nn.Linear(64, 10))))
    assert why is not None
    assert "no unit that could leave" in why


@pytest.mark.parametrize("measure", ["parameters", "macs"])
def test_a_budget_that_cannot_be_kept_says_what_could_be(context: Context, measure: str) -> None:
    before = copy.deepcopy(context.model.module.state_dict())
    with pytest.raises(InvalidSpec, match=rf"([\d.]+)% of the {measure} are left, and 1\.0% are asked for") as told:
        prune(context, keep_at_least=0.5, budget=TimedBudget(**{measure: 0.01}))
    after = context.model.module.state_dict()
    assert all(torch.equal(own, before[name]) for name, own in after.items())
    assert context.edits == []
    share = float(str(told.value).split("keep ")[1].split("%")[0]) / 100
    prune(context, keep_at_least=0.5, budget=TimedBudget(**{measure: share + 0.002}))
    assert_kept(context, measure, share + 0.002)


def test_data_is_asked_for_where_it_is_needed(trained: nn.Module, tmp_path: Path) -> None:
    for fields in ({"criterion": "taylor"}, {"criterion": "activations"}, {"scope": "auto"}):
        with pytest.raises(DatasetMismatch):
            prune(of(trained, None, tmp_path), **fields)
    prune(of(trained, None, tmp_path), criterion="l2")


def test_an_edit_is_left_that_makes_the_same_shapes(context: Context) -> None:
    prune(context)
    again = copy.deepcopy(context.teacher)
    assert context.edits
    edits.apply(again, context.edits)
    again.load_state_dict(context.model.module.state_dict())
    x = torch.randn(3, *PICTURES)
    assert torch.equal(again.eval()(x), context.model.module.eval()(x))


def test_training_recovers(context: Context) -> None:
    before = accuracy(context)
    details = prune(context, budget=TimedBudget(macs=0.5), training=BRIEF)
    assert accuracy(context) > before - 0.04
    assert details["training_steps"] == 2 * 16


def test_rounds_take_equal_shares_and_train_behind_each(context: Context) -> None:
    shares: list[float] = []
    context.progress = shares.append
    details = prune(context, budget=TimedBudget(macs=0.4), rounds=3, training=Training(epochs=1, lr=2e-3))
    assert_kept(context, "macs", 0.4)
    assert context.edits is not None
    assert len(context.edits) == 3
    module, left = copy.deepcopy(context.teacher), [1.0]
    for edit in context.edits:
        edits.apply(module, [edit])
        left.append(sizes(module)["macs"] / sizes(context.teacher)["macs"])
    for before, after in pairwise(left):
        assert after / before == pytest.approx(0.4 ** (1 / 3), abs=0.04)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert [units for units, _ in kept(details).values()] == [24, 24, 24, 32, 48]  # what there was at first


def penalized(module: nn.Module) -> float:
    """The penalty of a strength of 1."""
    groups = structure_of(module.eval(), (torch.zeros(2, *PICTURES),)).groups
    return float(Lasso(module, groups, 1.0)().detach())


def test_lasso_trains_in_front_and_makes_units_small(trained: nn.Module, digits: Data, tmp_path: Path) -> None:
    left = {}
    for strength in (1e-8, 1e-3):
        context = of(trained, digits, tmp_path)
        lasso = GroupLasso(strength=strength, training=Training(epochs=2, lr=2e-3))
        details = prune(context, budget=TimedBudget(parameters=0.6), lasso=lasso)
        left[strength] = penalized(context.model.module)
        assert float(details["lasso_last_epoch_loss"]) > 0  # type: ignore[arg-type]
        assert_kept(context, "parameters", 0.6)
    assert left[1e-3] < 0.9 * left[1e-8]


class Killed(BaseException):
    """Stands for the end of the process."""


RESUMED: dict[str, Any] = {
    "budget": TimedBudget(macs=0.4), "rounds": 3, "criterion": "taylor", "keep_at_least": 0.05,
    "training": Training(epochs=1, lr=2e-3, checkpoint_steps=4),
}  # fmt: skip
LASSO: dict[str, Any] = {"lasso": GroupLasso(training=Training(epochs=1, lr=2e-3, checkpoint_steps=4))}


@pytest.mark.parametrize(
    ("fields", "after"),
    [(RESUMED, 0.5), (RESUMED, 1.6), (RESUMED, 2.9), (RESUMED | LASSO, 0.5), (RESUMED | LASSO, 2.6)],
)
def test_after_a_kill_it_goes_on_with_the_part_and_ends_with_equal_bits(
    trained: nn.Module, digits: Data, tmp_path: Path, fields: dict[str, Any], after: float
) -> None:
    parts = 3 + ("lasso" in fields)
    whole = of(trained, digits, tmp_path / "whole")
    whole.scratch.mkdir()
    expected = prune(whole, **fields)
    saved: dict[str, Path] = {}
    first = of(trained, digits, tmp_path)

    def announce(kind: Kind, name: str) -> None:
        saved[kind] = Path(shutil.copy(tmp_path / name, tmp_path / f"stored-{kind}"))

    def kill(share: float) -> None:
        if share * parts > after:
            raise Killed

    first.checkpoints, first.progress = Checkpoints(tmp_path, announce, 0.0), kill
    with pytest.raises(Killed):
        prune(first, **fields)
    assert saved
    second = of(trained, digits, tmp_path)
    second.checkpoints = Checkpoints(tmp_path, None, 0.0, saved)
    shares: list[float] = []
    second.progress = shares.append
    found = prune(second, **fields)
    assert min(shares) * parts > int(after)  # the parts before were not taken again
    assert {name: own for name, own in found.items() if "resumed" not in name} == {
        name: own for name, own in expected.items() if "resumed" not in name
    }
    assert second.edits == whole.edits
    ours, theirs = second.model.module.state_dict(), whole.model.module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_batch_norms_find_their_statistics_again(context: Context, trained: nn.Module, tmp_path: Path) -> None:
    """Without the units that went those of the whole are wrong, and without samples they stay as they were."""
    prune(context, budget=TimedBudget(macs=0.5))
    blind = of(trained, None, tmp_path / "blind")
    prune(blind, budget=TimedBudget(macs=0.5))
    blind.feed = context.feed
    score = context.feed.score if context.feed else None
    assert score is not None
    was = score(lambda inputs: blind.model.module.eval()(*inputs), "test")[0]
    assert accuracy(context) > was + 0.1
    layer: Any = next(one for one in context.model.module.modules() if isinstance(one, nn.BatchNorm2d))
    other: Any = next(one for one in blind.model.module.modules() if isinstance(one, nn.BatchNorm2d))
    assert torch.equal(layer.weight, other.weight)
    assert not torch.equal(layer.running_var, other.running_var)
