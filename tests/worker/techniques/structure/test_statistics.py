"""Statistics of batch norms that are found again are those that a computation by hand finds."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.worker.helpers import context_for, digits_data, memory_data, tiny_model
from worker.data.base import Data
from worker.techniques.structure.statistics import Statistics, renew, whole


def network(*, dropout: float = 0.5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 12), nn.BatchNorm1d(12, momentum=0.01), nn.Dropout(dropout), nn.ReLU(), nn.Linear(12, 8),
        nn.BatchNorm1d(8), nn.Linear(8, 10),
    )  # fmt: skip


def by_hand(net: nn.Sequential, batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Means and variances of both, batch for batch, with what torch does to the statistics left out."""
    first = net[1]
    told: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for x in batches:
        h = x @ net[0].weight.T + net[0].bias
        told[0].append((h.mean(0), h.var(0, unbiased=True)))
        h = (h - h.mean(0)) / (h.var(0, unbiased=False) + first.eps).sqrt() * first.weight + first.bias  # type: ignore[operator]
        h = h.relu() @ net[4].weight.T + net[4].bias
        told[1].append((h.mean(0), h.var(0, unbiased=True)))
    return [
        (torch.stack([mean for mean, _ in own]).mean(0), torch.stack([var for _, var in own]).mean(0)) for own in told
    ]


def test_they_are_the_means_over_batches_of_each_batchs_own() -> None:
    net = network().train()
    batches = list(torch.randn(3, 20, 64).unbind())
    with torch.no_grad():
        expected = by_hand(net, batches)
    renew(net, [(x,) for x in batches])
    for place, (mean, var) in zip((1, 5), expected, strict=True):
        assert torch.allclose(net[place].running_mean, mean, atol=1e-5)  # type: ignore[arg-type]
        assert torch.allclose(net[place].running_var, var, atol=1e-5)  # type: ignore[arg-type]
    assert (net[1].momentum, net[5].momentum) == (0.01, 0.1)
    assert int(net[1].num_batches_tracked) == 0  # type: ignore[arg-type]
    assert not any(layer.training for layer in net.modules())


def test_a_norm_that_computes_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.norm(x), self.norm(3 * x + 1)])

    module, x = Twice(), torch.randn(30, 4)
    renew(module, [(x,)])
    assert torch.allclose(module.norm.running_mean, (x.mean(0) + (3 * x + 1).mean(0)) / 2, atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(module.norm.running_var, (x.var(0) + (3 * x).var(0)) / 2, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "left"), [((64, 64, 40), 3), ((64, 64, 32), 2), ((64, 1), 1), ((1,), 0), ((2,), 1), ((3,), 1)]
)
def test_a_short_end_is_left_out(sizes: tuple[int, ...], left: int) -> None:
    assert len(whole([(torch.zeros(size, 2),) for size in sizes])) == left


def test_they_are_found_on_samples_without_labels(tmp_path: Path) -> None:
    net = network(dropout=0.0)
    context = context_for(tiny_model(net), digits_data(), tmp_path)
    told = Statistics(context, 64).of(net)
    assert set(told) == {f"{place}.running_{what}" for place in (1, 5) for what in ("mean", "var")}
    x = digits_data().splits["calibration"].read(range(100)).inputs["input"]
    assert torch.is_tensor(x)
    assert x.shape == (100, 64)
    assert torch.allclose(told["1.running_mean"], net[0](x).mean(0), atol=0.1)
    assert all(torch.equal(own, net.state_dict()[name]) for name, own in told.items())


@pytest.mark.parametrize("data", [None, memory_data({"test": (torch.randn(20, 64), None)})])
def test_without_samples_they_stay(data: Data | None, tmp_path: Path) -> None:
    net = network()
    before = {name: own.clone() for name, own in net.state_dict().items()}
    assert Statistics(context_for(tiny_model(net), data, tmp_path), 64).of(net) == {}
    assert all(torch.equal(own, before[name]) for name, own in net.state_dict().items())


def test_one_value_a_channel_has_no_variance_to_find() -> None:
    layer = nn.BatchNorm1d(3)
    before = copy.deepcopy(layer.state_dict())
    renew(layer, [(torch.randn(1, 3),), (torch.randn(1, 3),)])
    assert all(torch.equal(own, before[name]) for name, own in layer.state_dict().items())
