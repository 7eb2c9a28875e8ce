"""What units are worth, beside NumPy and beside networks in which a unit is turned down."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from app.contract.errors import DatasetMismatch, InvalidSpec
from app.contract.structured import StructuredPrune
from tests.worker.helpers import context_for, memory_data, tiny_model
from worker.context import Context
from worker.structure.groups import Group, structure_of
from worker.techniques.structure.importance import scores
from worker.techniques.structure.lasso import Lasso

SAMPLES = 12


class Small(nn.Module):
    """Two convolutions, of which the second is flattened into 4 entries a channel, and a residual of neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5)
        self.second, self.deep = nn.Conv2d(5, 4, 3, stride=2), nn.Linear(16, 6)
        self.again, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.deep(torch.tanh(self.second(torch.relu(self.norm(self.first(x))))).flatten(1))
        return self.head(y + torch.tanh(self.again(y)))


@pytest.fixture
def context(tmp_path: Path) -> Context:
    torch.manual_seed(0)
    module = Small()
    x, y = torch.randn(SAMPLES, 1, 7, 7), torch.randint(0, 3, (SAMPLES,))
    with torch.no_grad():
        module.norm.weight.uniform_(-1, 1)
        module(x)
    own = context_for(tiny_model(module.eval(), shape=(1, 7, 7), classes=3), memory_data({"train": (x, y)}), tmp_path)
    own.model.module.double()
    return own


@pytest.fixture
def groups(context: Context) -> tuple[Group, ...]:
    return structure_of(context.model.module, (torch.randn(2, 1, 7, 7, dtype=torch.float64),)).groups


def own_scores(context: Context, groups: tuple[Group, ...], criterion: str, **fields: Any) -> dict[str, Tensor]:
    step = StructuredPrune(criterion=criterion, sparsity=0.5, samples=SAMPLES, **fields)  # type: ignore[arg-type]
    return scores(step, context, groups)


def array(context: Context, name: str) -> np.ndarray:
    return context.model.module.get_parameter(name).detach().numpy()


def samples(context: Context) -> tuple[Tensor, Tensor]:
    raw = context.feed.data.splits["train"].read(range(SAMPLES))  # type: ignore[union-attr]
    assert isinstance(raw.inputs, dict)
    assert isinstance(raw.targets, Tensor)
    return raw.inputs["input"].double(), raw.targets


def double(context: Context) -> None:
    """The feed's samples as the network, in float64, takes them."""
    context.model.module.register_forward_pre_hook(lambda layer, given: tuple(one.double() for one in given))


def test_the_groups_are_those_by_hand(groups: tuple[Group, ...]) -> None:
    assert [(group.name, group.units) for group in groups] == [
        ("first.weight", 5), ("second.weight", 4), ("deep.weight", 6),
    ]  # fmt: skip


@pytest.mark.parametrize(("criterion", "order"), [("l1", 1), ("l2", 2)])
def test_norms_are_of_all_weights_of_products_that_hang_on_a_unit(
    context: Context, groups: tuple[Group, ...], criterion: str, order: int
) -> None:
    own = own_scores(context, groups, criterion)
    first, second, deep, again, head = (
        np.abs(array(context, f"{name}.weight")) ** order for name in ("first", "second", "deep", "again", "head")
    )
    expected = {
        "first.weight": first.sum((1, 2, 3)) + second.sum((0, 2, 3)),
        "second.weight": second.sum((1, 2, 3)) + deep.reshape(6, 4, 4).sum((0, 2)),
        "deep.weight": deep.sum(1) + again.sum(0) + again.sum(1) + head.sum(0),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(own[name].numpy(), values ** (1 / order), rtol=1e-10)


def test_distances_are_those_of_what_makes_units(context: Context, groups: tuple[Group, ...]) -> None:
    own = own_scores(context, groups, "fpgm")
    rows = {
        "first.weight": array(context, "first.weight").reshape(5, -1),
        "second.weight": array(context, "second.weight").reshape(4, -1),
        "deep.weight": np.concatenate([array(context, "deep.weight"), array(context, "again.weight")], 1),
    }
    for name, values in rows.items():
        expected = np.linalg.norm(values[:, None] - values[None], axis=-1).sum(1)
        np.testing.assert_allclose(own[name].numpy(), expected, rtol=1e-6)


def test_factors_of_batch_norms_are_those_of_the_units_that_pass_one(
    context: Context, groups: tuple[Group, ...]
) -> None:
    own = own_scores(context, groups, "bn_scale")
    assert list(own) == ["first.weight"]
    np.testing.assert_allclose(own["first.weight"].numpy(), np.abs(array(context, "norm.weight")))


def test_without_a_batch_norm_its_factors_are_refused(context: Context, groups: tuple[Group, ...]) -> None:
    with pytest.raises(InvalidSpec, match="no unit passes one"):
        own_scores(context, groups[1:], "bn_scale")


def test_random_is_by_the_seed(context: Context, groups: tuple[Group, ...]) -> None:
    one, same = own_scores(context, groups, "random"), own_scores(context, groups, "random")
    assert all(torch.equal(one[name], same[name]) for name in one)
    context.seed += 1
    assert not torch.equal(own_scores(context, groups, "random")["deep.weight"], one["deep.weight"])


def turned(context: Context, group: Group, unit: int, factor: float) -> nn.Module:
    """The network with a factor in front of what reads a unit."""
    module = copy.deepcopy(context.model.module)
    tensors = dict(module.named_parameters())
    with torch.no_grad():
        for cut in group.cuts:
            # The residual is read by what makes it as well: there the one side alone.
            if not cut.made:
                tensors[cut.parameter].index_copy_(
                    cut.dim,
                    cut.places[unit],
                    tensors[cut.parameter].index_select(cut.dim, cut.places[unit]) * factor,
                )
    return module


def changes(context: Context, group: Group, unit: int) -> Tensor:
    """Of each sample's loss by the factor, by finite differences."""
    (x, y), step = samples(context), 1e-5
    with torch.no_grad():
        high, low = (
            cross_entropy(turned(context, group, unit, 1 + own)(x), y, reduction="none") for own in (step, -step)
        )
    return (high - low) / (2 * step)


@pytest.mark.parametrize(
    ("criterion", "mean"),
    [("taylor", lambda change: change.abs().mean()), ("fisher", lambda change: change.square().mean())],
)
def test_by_gradients_it_is_what_a_factor_in_front_of_a_unit_does_to_each_samples_loss(
    context: Context, groups: tuple[Group, ...], criterion: str, mean: Callable[[Tensor], Tensor]
) -> None:
    expected = {
        group.name: torch.stack([mean(changes(context, group, unit)) for unit in range(group.units)])
        for group in groups
    }
    double(context)
    own = own_scores(context, groups, criterion)
    for name, values in expected.items():
        # Whether a sum or a mean over samples: the same for all units.
        factor = float(own[name].sum() / values.sum())
        assert factor == pytest.approx(SAMPLES, rel=1e-4) or factor == pytest.approx(1, rel=1e-4)
        assert torch.allclose(own[name] / factor, values, rtol=1e-4)


def test_gradients_leave_the_network_as_it_was(context: Context, groups: tuple[Group, ...]) -> None:
    double(context)
    context.model.module.requires_grad_(False)
    own_scores(context, groups, "taylor")
    assert all(one.grad is None and not one.requires_grad for one in context.model.module.parameters())


def test_by_inputs_it_is_what_comes_in_times_what_reads_it(context: Context, groups: tuple[Group, ...]) -> None:
    x, module = samples(context)[0], context.model.module
    with torch.no_grad():
        one = torch.relu(module.norm(module.first(x)))
        two = torch.tanh(module.second(one)).flatten(1)
        three = module.deep(two)
        last = three + torch.tanh(module.again(three))
    double(context)
    own = own_scores(context, groups, "activations")

    def told(came: Tensor, weight: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        return came.square().mean(0).numpy() * np.square(weight).sum(axes)

    expected = {
        "first.weight": told(one.movedim(1, -1).reshape(-1, 5), array(context, "second.weight"), (0, 2, 3)),
        "second.weight": told(two, array(context, "deep.weight"), (0,)).reshape(4, 4).sum(1),
        "deep.weight": told(three, array(context, "again.weight"), (0,))
        + told(last, array(context, "head.weight"), (0,)),
    }
    del expected["deep.weight"]  # see below: who reads what it makes is not told apart
    for name, values in expected.items():
        np.testing.assert_allclose(own[name].numpy(), np.sqrt(values), rtol=1e-6)
    assert bool((own["deep.weight"] > 0).all())


def test_a_unit_that_never_says_anything_is_worth_nothing(context: Context, groups: tuple[Group, ...]) -> None:
    with torch.no_grad():
        context.model.module.norm.weight[2] = 0
        context.model.module.norm.bias[2] = -1
    double(context)
    for criterion in ("taylor", "fisher", "activations"):
        own = own_scores(context, groups, criterion)["first.weight"]
        assert own[2] == 0
        assert int((own == 0).sum()) == 1


def test_without_data_samples_cannot_be_looked_at(context: Context, groups: tuple[Group, ...]) -> None:
    context.feed = None
    for criterion in ("taylor", "fisher", "activations"):
        with pytest.raises(DatasetMismatch):
            own_scores(context, groups, criterion)


def lasso_by_hand(tensors: Mapping[str, np.ndarray]) -> float:
    """The sum over units of the norm of all that hangs on it, times the root of how many weights that is."""
    first, second, deep = tensors["first.weight"], tensors["second.weight"], tensors["deep.weight"]
    again, head, total = tensors["again.weight"], tensors["head.weight"], 0.0
    for unit in range(5):
        own = np.concatenate([first[unit].ravel(), second[:, unit].ravel()])
        total += np.sqrt(own.size) * np.linalg.norm(own)
    for unit in range(4):
        own = np.concatenate([second[unit].ravel(), deep[:, 4 * unit : 4 * unit + 4].ravel()])
        total += np.sqrt(own.size) * np.linalg.norm(own)
    for unit in range(6):
        own = np.concatenate([deep[unit], again[unit], again[:, unit], head[:, unit]])
        total += np.sqrt(own.size) * np.linalg.norm(own)
    return float(total)


def test_group_lasso_is_the_sum_of_the_norms_of_units(context: Context, groups: tuple[Group, ...]) -> None:
    penalty = Lasso(context.model.module, groups, 0.3)
    tensors = {name: own.detach().numpy() for name, own in context.model.module.named_parameters()}
    assert float(penalty()) == pytest.approx(0.3 * lasso_by_hand(tensors), rel=1e-5)
    assert list(penalty.parameters()) == []


def test_group_lasso_has_a_gradient_where_a_unit_is_gone(context: Context, groups: tuple[Group, ...]) -> None:
    module = context.model.module
    with torch.no_grad():
        module.first.weight[1] = 0
        module.second.weight[:, 1] = 0
    Lasso(module, groups, 1.0)().backward()
    gradients = {name: own.grad for name, own in module.named_parameters() if own.ndim > 1}
    assert all(own is not None and bool(torch.isfinite(own).all()) for own in gradients.values())
    assert not bool(gradients["first.weight"][1].any())  # type: ignore[index]
    # Towards zero elsewhere, in the length that a unit of so many weights has.
    weights = module.first.weight.detach()
    cosine = torch.cosine_similarity(gradients["first.weight"][0].flatten(), weights[0].flatten(), dim=0)  # type: ignore[index]
    assert float(cosine) == pytest.approx(1, abs=1e-6)
