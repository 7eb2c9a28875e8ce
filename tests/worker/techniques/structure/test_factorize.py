"""The factorize step: budgets are kept, nothing is made larger, and what is delivered is what was chosen."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from app.contract.architecture import Architecture
from app.contract.budgets import TimedBudget
from app.contract.errors import InvalidSpec, Unsupported
from app.contract.factorizing import Factorize
from app.contract.training import Training
from tests.worker.helpers import context_for, digits_data, memory_data, mlp, tiny_model
from worker.context import Context
from worker.evaluation.macs import module_macs
from worker.structure.described import described
from worker.structure.forms import Factors, kernel_of
from worker.techniques.base import Details
from worker.techniques.pruning.weights import select
from worker.techniques.structure import factor_math
from worker.techniques.structure.allocation import as_stored
from worker.techniques.structure.candidates import candidates
from worker.techniques.structure.factorize import FactorizeTechnique
from worker.techniques.structure.metrics import moments_of
from worker.techniques.structure.ranking import ranking
from worker.training.loop import train

PICTURES = (1, 8, 8)


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 48, 3, padding=1, stride=2), nn.BatchNorm2d(48),
        nn.ReLU(), nn.Flatten(), nn.Linear(48 * 16, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


class Shared(nn.Module):
    """Two layers of one weight, one that reads another's weight, attention of torch's own, and one that is free."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.read = nn.Linear(64, 64)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.free = nn.Linear(64, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = self.second(self.first(x)).to(self.read.weight.dtype)[:, None]
        attended: torch.Tensor = self.attention(steps, steps, steps)[0][:, 0]
        return self.out(self.free(self.read(attended)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    found = {}
    for name, module, shape in (("mlp", mlp(), (64,)), ("convnet", wide(), PICTURES)):
        context = context_for(tiny_model(module, shape=shape), digits_data(shape), tmp_path_factory.mktemp(name))
        train(context, Training(epochs=12, lr=3e-3))
        found[name] = context.model.module
    return found


@pytest.fixture
def context(trained: dict[str, nn.Module], tmp_path: Path) -> Context:
    return of(trained["mlp"], (64,), tmp_path)


@pytest.fixture
def pictures(trained: dict[str, nn.Module], tmp_path: Path) -> Context:
    return of(trained["convnet"], PICTURES, tmp_path)


def of(module: nn.Module, shape: tuple[int, ...], folder: Path) -> Context:
    return context_for(tiny_model(copy.deepcopy(module), shape=shape), digits_data(shape), folder)


def factorize(context: Context, **fields: Any) -> Details:
    return FactorizeTechnique().apply(Factorize(**fields), context)


def accuracy(context: Context) -> float:
    assert context.feed is not None
    return context.feed.score(lambda inputs: context.model.module(*inputs), "test")[0]


def parameters(context: Context) -> int:
    return sum(own.numel() for own in context.model.module.parameters())


def macs(context: Context) -> int:
    return module_macs(context.model.module, context.model.example(1))


@pytest.mark.parametrize("share", [0.7, 0.4])
@pytest.mark.parametrize("measure", ["parameters", "macs", "bytes"])
@pytest.mark.parametrize("which", ["context", "pictures"])
def test_a_budget_is_kept_and_used(which: str, measure: str, share: float, request: pytest.FixtureRequest) -> None:
    own: Context = request.getfixturevalue(which)
    before = {"parameters": parameters(own), "macs": macs(own), "bytes": parameters(own)}
    details = factorize(own, budget=TimedBudget(**{measure: share}))
    after = {"parameters": parameters(own), "macs": macs(own), "bytes": parameters(own)}
    left = after[measure] / before[measure]
    assert share - 0.035 <= left <= share  # a rank of the largest layer is 2 % of this network
    assert details["parameters_share"] == after["parameters"] / before["parameters"]
    assert details["macs_share"] == after["macs"] / before["macs"]
    rows: Any = details["layers"]
    changed = [row for row in rows if row["form"]]
    assert len(changed) == details["factorized_layers"] == len(own.edits or ()) > 0
    assert all(0 < row["energy"] < 1 for row in changed)


def test_a_budget_that_cannot_be_kept_says_what_could_be(context: Context) -> None:
    before = copy.deepcopy(context.model.module.state_dict())
    with pytest.raises(InvalidSpec, match=r"lowest ranks .* of the parameters are left, and the budget is 1.0%"):
        factorize(context, budget=TimedBudget(parameters=0.01))
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.model.module.state_dict().items())


def test_every_layer_keeps_its_energy_where_that_saves(context: Context) -> None:
    module = context.model.module
    weight = next(layer for layer in module.modules() if isinstance(layer, nn.Linear)).weight.detach()
    details = factorize(context, energy=0.5)
    rows: Any = details["layers"]
    assert all(row["energy"] >= 0.5 for row in rows)
    energies = torch.linalg.svdvals(weight).square()
    rank = int((energies.cumsum(0) < 0.5 * energies.sum()).sum()) + 1
    assert rank <= int(rows[0]["ranks"]) <= rank + 1  # of those that are looked at
    assert parameters(context) < sum(own.numel() for own in module.parameters())


def test_nothing_is_made_larger(context: Context) -> None:
    details = factorize(context, energy=0.9999)
    assert details["factorized_layers"] == 0
    assert details["parameters_share"] == 1
    assert context.edits == []


@pytest.mark.parametrize("criterion", ["weights", "activations", "fisher"])
@pytest.mark.parametrize("allocation", ["energy", "measured"])
def test_every_criterion_leaves_a_network_worth_having(context: Context, criterion: str, allocation: str) -> None:
    before = accuracy(context)
    factorize(context, budget=TimedBudget(parameters=0.6), criterion=criterion, allocation=allocation)
    assert accuracy(context) > before - 0.1


def test_by_what_comes_in_less_is_lost_than_by_weights(trained: dict[str, nn.Module], tmp_path: Path) -> None:
    lost = {}
    for criterion in ("weights", "activations"):
        own = of(trained["mlp"], (64,), tmp_path)
        assert own.feed is not None
        inputs = next(own.feed.batches("train", 256)).inputs
        with torch.no_grad():
            before = own.model.module(*inputs)
            factorize(own, budget=TimedBudget(parameters=0.35), criterion=criterion)
            lost[criterion] = float((own.model.module(*inputs) - before).square().mean())
    assert lost["activations"] < lost["weights"] / 2


@pytest.mark.parametrize("method", ["svd", "tucker", "cp"])
def test_methods_take_what_they_are_for(pictures: Context, method: str) -> None:
    details = factorize(pictures, method=method, energy=0.5)
    rows: Any = details["layers"]
    layers = dict(pictures.teacher.named_modules())
    kinds = {"svd": nn.Linear, "tucker": nn.Conv2d, "cp": nn.Conv2d}
    assert rows
    assert all(isinstance(layers[row["name"]], kinds[method]) for row in rows)
    assert {row["form"] for row in rows} <= {method, None}


def test_training_recovers(pictures: Context) -> None:
    before = accuracy(pictures)
    details = factorize(
        pictures, budget=TimedBudget(parameters=0.4, macs=None), training=Training(epochs=8, lr=3e-3, distill={})
    )
    assert accuracy(pictures) > before - 0.03
    assert details["training_steps"]


def test_layers_that_a_product_cannot_stand_for_stay(tmp_path: Path) -> None:
    own = of(Shared(), (64,), tmp_path)
    details = factorize(own, energy=0.3)
    rows: Any = details["layers"]
    assert [row["name"] for row in rows] == ["free", "out"]
    assert own.model.module(*own.model.example(3)).shape == (3, 10)


def test_what_is_excluded_stays(context: Context) -> None:
    details = factorize(context, budget=TimedBudget(parameters=0.8), exclude=("0",))
    rows: Any = details["layers"]
    assert "0" not in [row["name"] for row in rows]
    step = Factorize(energy=0.5, exclude=("*",))
    with pytest.raises(InvalidSpec, match="leaves nothing"):
        FactorizeTechnique().applies(step, context.model)
    why = FactorizeTechnique().applies(Factorize(energy=0.5, method="cp"), context.model)
    assert why is not None
    assert "method cp" in why


def test_volumes_are_seen_by_their_channels(tmp_path: Path) -> None:
    """Of as many channels as places, which a layer of matrices would take for columns."""
    torch.manual_seed(0)
    volumes = torch.randn(64, 3, 4, 4, 6)
    module = nn.Sequential(nn.Conv3d(3, 6, 1), nn.Conv3d(6, 8, 3, padding=1), nn.Flatten(), nn.Linear(768, 10))
    data = memory_data({"train": (volumes, torch.randint(0, 10, (64,)))})
    own = context_for(tiny_model(module, shape=(3, 4, 4, 6)), data, tmp_path)
    step = Factorize(budget=TimedBudget(parameters=0.5), criterion="activations", samples=64)
    layers = candidates(step, own.model)
    found = moments_of(step, own, [one.weight for one in layers])
    with torch.no_grad():
        rows = module[0](volumes).movedim(1, -1).reshape(-1, 6)
    assert torch.allclose(found["1"], rows.T @ rows, rtol=1e-3)
    FactorizeTechnique().apply(step, own)


class Attended(nn.Module):
    """GPT-2's own linear layer, as wide as it is high: its transpose would fit as well."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.out = Conv1D(64, 64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.square(x)))


def test_a_square_layer_with_its_inputs_first_is_measured_as_it_lies(tmp_path: Path) -> None:
    own = of(Attended(), (64,), tmp_path)
    step = Factorize(budget=TimedBudget(parameters=0.5), samples=64)
    (one,) = (one for one in candidates(step, own.model) if one.name == "square")
    own_ranking = ranking(one, factor_math.plain(kernel_of(one.layer)), 0)
    whole = as_stored(one, own_ranking.product(Factors("svd", (64,))))
    assert torch.allclose(whole, one.weight.value(), atol=1e-5)
    details = factorize(own, budget=TimedBudget(parameters=0.5), allocation="measured")
    assert details["factorized_layers"]


def test_neurons_that_never_fire_do_not_make_factors_that_cannot_be_trained(context: Context) -> None:
    layers = [layer for layer in context.model.module.modules() if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        layers[0].bias.fill_(-100.0)
    factorize(context, budget=TimedBudget(parameters=0.7), criterion="activations")
    assert all(0 <= float(own.abs().max()) < 1e3 for own in context.model.module.parameters() if own.ndim > 1)


def test_a_layer_is_still_called_what_it_was(context: Context) -> None:
    factorize(context, energy=0.5)
    was = [name for name, _ in context.teacher.named_parameters() if name.endswith("weight")]
    first = was[0].removesuffix(".weight")
    left = {weight.name for weight in select(context.model.module, (first,))}
    assert left == {weight.name for weight in select(context.model.module, (was[0],))}
    assert not any(name.startswith(f"{first}.") for name in left)
    assert len(left) < len(select(context.model.module, ()))


def test_more_layers_than_an_architecture_may_have_are_refused_before_anything_is_trained() -> None:
    layers = Architecture.model_validate(
        {"layers": [{"type": "Linear", "in_features": 8, "out_features": 8}] * 400}
    ).layers
    module = nn.Sequential(*(nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 8)) for _ in layers))
    with pytest.raises(Unsupported, match="at most 1000 layers"):
        described(layers, module)


def test_a_module_of_two_names_stays(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.again, self.out = self.first, nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.again(self.first(x)))

    own = of(Twice(), (64,), tmp_path)
    assert [one.name for one in candidates(Factorize(energy=0.5), own.model)] == ["out"]
